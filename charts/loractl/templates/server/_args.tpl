{{/* The command of the server: what values.yaml says, as flags of `loractl serve`. Secrets are files, never flags. */}}
{{- define "loractl.server.args" -}}
- serve
- {{ printf "%s/%s" .Values.server.model.mountPath .Values.server.model.path | quote }}
- --host=0.0.0.0
- --port=8800
{{- with .Values.server }}
{{- with .model.name }}
- --name={{ . }}
{{- end }}
- --quantize={{ .model.quantize }}
- --dtype={{ .model.dtype }}
{{- with include "loractl.hubUrl" $ }}
- --hub={{ . }}
{{- end }}
{{- if .access.keysSecret.name }}
- --keys=/run/secrets/loractl/keys
{{- else if .access.allowAnonymous }}
- --insecure
{{- end }}
- --slots={{ .adapters.gpuSlots }}
- --max-rank={{ .adapters.maxRank }}
- --host-cache={{ include "loractl.bytes" .adapters.hostCache }}
- --cache-dir=/var/cache/loractl
- --disk-cache={{ include "loractl.bytes" .adapters.diskCache.size }}
{{- range .adapters.preload }}
- --preload={{ . }}
{{- end }}
- --max-queue={{ .limits.maxQueue }}
- --max-running={{ .limits.maxBatchRequests }}
{{- if gt (int .limits.maxModelTokens) 0 }}
- --max-model-len={{ .limits.maxModelTokens }}
{{- end }}
{{- with .limits.kvCache }}
- --kv-cache={{ include "loractl.bytes" . }}
{{- end }}
- --request-timeout={{ .limits.requestTimeoutSeconds }}
- --drain-timeout={{ .drain.timeoutSeconds }}
- --metrics-port=9090
- --metrics-adapter-label={{ .metrics.adapterLabel }}
- --metrics-max-adapters={{ .metrics.maxAdapterLabels }}
- --metrics-compat={{ .metrics.compat }}
{{- range .extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}
