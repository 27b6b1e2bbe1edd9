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
{{- if .Values.hub.database.urlSecret.name }}
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
{{- with .Values.hub.database.urlSecret }}
{{- if .name }}
- name: secrets
  secret:
    secretName: {{ .name }}
    defaultMode: 0440
    items:
      - key: {{ .key }}
        path: database-url
{{- end }}
{{- end }}
{{- with .Values.hub.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What a hub's pods share but for their command: who they are, what they may, where the database and blobs are. */}}
{{- define "loractl.hub.podBasics" -}}
serviceAccountName: {{ include "loractl.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.hub.podSecurityContext | nindent 2 }}
{{- end -}}

{{- define "loractl.hub.containerBasics" -}}
image: {{ include "loractl.image" (dict "root" $ "variant" "cpu") | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [loractl]
securityContext:
  {{- toYaml .Values.hub.securityContext | nindent 2 }}
env:
  {{- include "loractl.hub.env" . | nindent 2 }}
{{- with .Values.hub.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.hub.resources | nindent 2 }}
{{- end -}}

{{/* The hub's own volume: its claim, or room for uploads in progress where state is elsewhere. */}}
{{- define "loractl.hub.dataVolume" -}}
- name: data
  {{- if include "loractl.hub.stateless" . }}
  # Uploads in progress only; what is finished is in S3.
  emptyDir:
    sizeLimit: {{ .Values.hub.persistence.size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-hub" (include "loractl.fullname" .)) .Values.hub.persistence.existingClaim }}
  {{- end }}
{{- end -}}
