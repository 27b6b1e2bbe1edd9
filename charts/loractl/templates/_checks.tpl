{{/* Combinations that the schema cannot express. Each message names the value and the way out. */}}

{{- define "loractl.checkServer" -}}
{{- $server := .Values.server -}}
{{- if not $server.model.path -}}
{{- fail "server.model.path is empty: name the folder of the base model below server.model.mountPath" -}}
{{- end -}}
{{- if and $server.model.existingClaim $server.model.hostPath -}}
{{- fail "server.model.existingClaim and server.model.hostPath are both set: keep one" -}}
{{- end -}}
{{- if not (or $server.model.existingClaim $server.model.hostPath $server.initContainers) -}}
{{- fail "the server has no base model: set server.model.existingClaim or server.model.hostPath, or fill the volume `models` by server.initContainers" -}}
{{- end -}}
{{- if not (or $server.access.keysSecret.name $server.access.allowAnonymous) -}}
{{- fail "the server has no API keys: set server.access.keysSecret.name, or server.access.allowAnonymous=true if everybody who reaches it may use it" -}}
{{- end -}}
{{- if and (ne $server.autoscaling.kind "none") (gt (int $server.autoscaling.minReplicas) (int $server.autoscaling.maxReplicas)) -}}
{{- fail "server.autoscaling.minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled $server.hub.url (not .Values.networkPolicy.serverExtraEgress) -}}
{{- fail "server.hub.url is outside of this release and networkPolicy.serverExtraEgress is empty: the server could not reach it" -}}
{{- end -}}
{{- end -}}

{{- define "loractl.checkHub" -}}
{{- $hub := .Values.hub -}}
{{- if gt (int $hub.replicas) 1 -}}
{{- if not $hub.database.urlSecret.name -}}
{{- fail "hub.replicas is above 1 on SQLite: set hub.database.urlSecret.name (PostgreSQL), or hub.replicas=1" -}}
{{- end -}}
{{- if not $hub.blobs.url -}}
{{- fail "hub.replicas is above 1 with blobs on a local volume: set hub.blobs.url (S3), or hub.replicas=1" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (or $hub.database.urlSecret.name $hub.blobs.url) (not .Values.networkPolicy.hubExtraEgress) -}}
{{- fail "the hub uses PostgreSQL or S3 and networkPolicy.hubExtraEgress is empty: it could not reach them" -}}
{{- end -}}
{{- end -}}

{{- define "loractl.checkTraining" -}}
{{- $training := .Values.training -}}
{{- if not $training.recipe -}}
{{- fail "training.recipe is empty: give what `loractl train RECIPE` would read" -}}
{{- end -}}
{{- if and $training.pushTo (not (include "loractl.hubUrl" .)) -}}
{{- fail "training.pushTo is set and there is no hub: set server.hub.url or hub.enabled=true" -}}
{{- end -}}
{{- end -}}

{{- define "loractl.checkGateway" -}}
{{- if and .Values.gateway.httpRoute.enabled (not .Values.gateway.httpRoute.parentRefs) -}}
{{- fail "gateway.httpRoute.parentRefs is empty: name the Gateway that carries the route" -}}
{{- end -}}
{{- if and .Values.gateway.hubRoute.enabled (not .Values.gateway.hubRoute.parentRefs) -}}
{{- fail "gateway.hubRoute.parentRefs is empty: name the Gateway that carries the route" -}}
{{- end -}}
{{- end -}}
