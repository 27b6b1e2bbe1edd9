{{/* The command of the hub: what values.yaml says, as flags of `loractl hub serve`. Secrets are files, never flags. */}}
{{- define "loractl.hub.args" -}}
- hub
- serve
- --root=/var/lib/loractl
- --host=0.0.0.0
- --port=8700
{{- with .Values.hub.blobs.url }}
- --blobs={{ . }}
{{- end }}
{{- range .Values.hub.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Whether state is only in PostgreSQL and S3, so that pods can come and go freely. */}}
{{- define "loractl.hub.stateless" -}}
{{- if and .Values.hub.database.urlSecret.name .Values.hub.blobs.url -}}yes{{- end -}}
{{- end -}}

{{- define "loractl.hub.env" -}}
- name: HOME
  value: /tmp
- name: LORACTL_HUB_ANONYMOUS_READ
  value: {{ .Values.hub.auth.anonymousRead | quote }}
{{- with .Values.hub.publicUrl }}
- name: LORACTL_HUB_PUBLIC_URL
  value: {{ . }}
{{- end }}
{{- if .Values.hub.database.urlSecret.name }}
- name: LORACTL_HUB_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.hub.database.urlSecret.name }}
      key: {{ .Values.hub.database.urlSecret.key }}
{{- end }}
{{- with .Values.hub.blobs }}
{{- if .url }}
- name: AWS_REGION
  value: {{ .region }}
{{- with .endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . }}
{{- end }}
{{- if .credentialsSecret.name }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ .credentialsSecret.name }}
      key: {{ .credentialsSecret.accessKeyIdKey }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .credentialsSecret.name }}
      key: {{ .credentialsSecret.secretAccessKeyKey }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.hub.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loractl.hub.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- with .Values.hub.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loractl.hub.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.hub.tmpSize }}
{{- with .Values.hub.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
