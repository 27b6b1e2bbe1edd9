{{/* Volumes of the server's pod: base models, the adapter cache with its limit, memory for processes, secrets. */}}
{{- define "loractl.server.volumes" -}}
{{- $server := .Values.server -}}
- name: models
  {{- if $server.model.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $server.model.existingClaim }}
    readOnly: true
  {{- else if $server.model.hostPath }}
  hostPath:
    path: {{ $server.model.hostPath }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ $server.model.emptyDirSize }}
  {{- end }}
{{- if ne $server.workload "StatefulSet" }}
- name: adapter-cache
  {{- if $server.adapters.diskCache.storageClassName }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        {{- include "loractl.server.cacheClaim" . | nindent 8 }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ include "loractl.cacheVolumeBytes" $server.adapters.diskCache.size | quote }}
  {{- end }}
{{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ $server.shmSize }}
- name: tmp
  emptyDir:
    sizeLimit: {{ $server.tmpSize }}
{{- if or $server.access.keysSecret.name $server.hub.tokenSecret.name }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- with $server.access.keysSecret }}
      {{- if .name }}
      - secret:
          name: {{ .name }}
          items:
            - key: {{ .key }}
              path: keys
      {{- end }}
      {{- end }}
      {{- with $server.hub.tokenSecret }}
      {{- if .name }}
      - secret:
          name: {{ .name }}
          items:
            - key: {{ .key }}
              path: hub-token
      {{- end }}
      {{- end }}
{{- end }}
{{- with $server.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "loractl.server.cacheClaim" -}}
{{- with .Values.server.adapters.diskCache -}}
accessModes: [ReadWriteOnce]
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ include "loractl.cacheVolumeBytes" .size | quote }}
{{- end -}}
{{- end -}}
