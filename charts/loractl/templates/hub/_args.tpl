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
- --drain-timeout={{ .Values.hub.drain.timeoutSeconds }}
- --metrics-port=9090
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
{{- if .Values.hub.database.urlSecret.name }}
- name: LORACTL_HUB_DATABASE_URL_FILE
  value: /run/secrets/loractl/database-url
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
- name: AWS_SHARED_CREDENTIALS_FILE
  value: /run/secrets/loractl/s3-credentials
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.hub.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loractl.hub.hasSecrets" -}}
{{- if or .Values.hub.database.urlSecret.name .Values.hub.auth.bootstrapTokenSecret.name (and .Values.hub.blobs.url .Values.hub.blobs.credentialsSecret.name) -}}yes{{- end -}}
{{- end -}}

{{- define "loractl.hub.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if include "loractl.hub.hasSecrets" . }}
- name: secrets
  mountPath: /run/secrets/loractl
  readOnly: true
{{- end }}
{{- with .Values.hub.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loractl.hub.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.hub.tmpSize }}
{{- if include "loractl.hub.hasSecrets" . }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- with .Values.hub.database.urlSecret }}
      {{- if .name }}
      - secret:
          name: {{ .name }}
          items:
            - key: {{ .key }}
              path: database-url
      {{- end }}
      {{- end }}
      {{- with .Values.hub.auth.bootstrapTokenSecret }}
      {{- if .name }}
      - secret:
          name: {{ .name }}
          items:
            - key: {{ .key }}
              path: bootstrap-token
      {{- end }}
      {{- end }}
      {{- with .Values.hub.blobs }}
      {{- if and .url .credentialsSecret.name }}
      - secret:
          name: {{ .credentialsSecret.name }}
          items:
            - key: {{ .credentialsSecret.accessKeyIdKey }}
              path: s3-access-key-id
            - key: {{ .credentialsSecret.secretAccessKeyKey }}
              path: s3-secret-access-key
      {{- end }}
      {{- end }}
{{- end }}
{{- with .Values.hub.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
