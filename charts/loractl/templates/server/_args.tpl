{{/* The command of the server: what values.yaml says, as flags of `loractl serve`. Secrets are never flags. */}}
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
{{- if .hub.tokenSecret.name }}
- --token-file=/run/secrets/loractl/hub-token
{{- end }}
{{- if .access.keysSecret.name }}
- --api-keys=/run/secrets/loractl/keys
{{- else if .access.allowAnonymous }}
- --insecure
{{- end }}
- --slots={{ .adapters.gpuSlots }}
- --max-rank={{ .adapters.maxRank }}
- --cache=/var/cache/loractl/adapters
- --cache-bytes={{ include "loractl.bytes" .adapters.diskCache.size }}
- --max-queue={{ .limits.maxQueue }}
- --max-running={{ .limits.maxRunning }}
{{- if gt (int .limits.maxModelTokens) 0 }}
- --max-model-len={{ .limits.maxModelTokens }}
{{- end }}
- --drain-timeout={{ .drain.timeoutSeconds }}
{{- if .metrics.vllmNames }}
- --vllm-metrics
{{- end }}
{{- range .extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}
