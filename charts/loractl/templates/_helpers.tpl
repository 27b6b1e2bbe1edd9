{{/* Names, labels and sums that several templates share. */}}

{{- define "loractl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters, so that every suffix (-hub-migration, -server-headless) stays below Kubernetes' 63. */}}
{{- define "loractl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "loractl.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods: never the version, which changes. Takes (dict "root" $ "component" "server"). */}}
{{- define "loractl.selectorLabels" -}}
app.kubernetes.io/name: {{ include "loractl.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "loractl.labels" -}}
{{ include "loractl.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: loractl
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* `metadata` of a resource. Takes (dict "root" $ "component" c "name" n), and optional "annotations" and "labels". */}}
{{- define "loractl.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "loractl.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (deepCopy (default dict .annotations)) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "loractl.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "loractl.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Takes (dict "root" $ "variant" "cpu"|"cuda"). */}}
{{- define "loractl.image" -}}
{{- $image := .root.Values.image -}}
{{- $digest := get $image (printf "%sDigest" .variant) -}}
{{- if $digest -}}
{{- printf "%s@%s" $image.repository $digest -}}
{{- else -}}
{{- printf "%s:%s-%s" $image.repository (default .root.Chart.AppVersion $image.tag) .variant -}}
{{- end -}}
{{- end -}}

{{- define "loractl.variant" -}}
{{- ternary "cuda" "cpu" (gt (int .count) 0) -}}
{{- end -}}

{{/* A Kubernetes quantity as a number of bytes. */}}
{{- define "loractl.bytes" -}}
{{- $digits := regexFind "^[0-9]+" (toString .) -}}
{{- $factors := dict "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mul (int64 $digits) (get $factors (trimPrefix $digits (toString .))) -}}
{{- end -}}

{{/* What is written while old files are still there needs room beyond the cache's own limit. */}}
{{- define "loractl.cacheVolumeBytes" -}}
{{- $bytes := include "loractl.bytes" . | int64 -}}
{{- add $bytes (div $bytes 10) -}}
{{- end -}}

{{/* Requests and limits with the GPUs added. Takes (dict "resources" r "gpu" g). */}}
{{- define "loractl.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpu.count) 0 -}}
{{- $devices := dict .gpu.resourceName (int .gpu.count) -}}
{{- $_ := set $resources "requests" (merge (deepCopy $devices) (default dict $resources.requests)) -}}
{{- $_ := set $resources "limits" (merge (deepCopy $devices) (default dict $resources.limits)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Where pods run, the same for each part. Takes (dict "root" $ "part" values "component" c). */}}
{{- define "loractl.scheduling" -}}
{{- with .part.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "loractl.topologySpread" -}}
topologySpreadConstraints:
{{- if .part.topologySpreadConstraints }}
  {{- toYaml .part.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "loractl.selectorLabels" . | nindent 8 }}
{{- end }}
{{- end -}}

{{/* `auto`, `true` or `false` for a kind that not every cluster knows. Takes (dict "root" $ "switch" s "api" a). */}}
{{- define "loractl.wanted" -}}
{{- if eq (toString .switch) "auto" -}}
{{- if .root.Capabilities.APIVersions.Has .api -}}yes{{- end -}}
{{- else if eq (toString .switch) "true" -}}yes{{- end -}}
{{- end -}}

{{- define "loractl.hubUrl" -}}
{{- if .Values.server.hub.url -}}
{{- .Values.server.hub.url -}}
{{- else if .Values.hub.enabled -}}
{{- printf "http://%s-hub:%d" (include "loractl.fullname" .) (int .Values.hub.service.port) -}}
{{- end -}}
{{- end -}}

{{- define "loractl.terminationGraceSeconds" -}}
{{- add (int .preStopSeconds) (int .timeoutSeconds) 15 -}}
{{- end -}}

{{/* The only ways a pod of ours may ask for names. */}}
{{- define "loractl.dnsEgress" -}}
- to:
    - namespaceSelector: {}
      podSelector:
        matchLabels:
          k8s-app: kube-dns
  ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
{{- end -}}
