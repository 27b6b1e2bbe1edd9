{{/* What a training Job and a Kubeflow runtime have in common. */}}
{{- define "loractl.training.container" -}}
{{- $training := .Values.training -}}
image: {{ include "loractl.image" (dict "root" $ "variant" (include "loractl.variant" $training.gpu)) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
env:
  - name: HOME
    value: /tmp
  {{- with include "loractl.hubUrl" . }}
  - name: LORACTL_HUB
    value: {{ . }}
  {{- end }}
  {{- if $training.tokenSecret.name }}
  - name: LORACTL_TOKEN_FILE
    value: /run/secrets/loractl/hub-token
  {{- end }}
  {{- with $training.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumeMounts:
  - name: recipe
    mountPath: /etc/loractl
    readOnly: true
  - name: out
    mountPath: /out
  - name: shm
    mountPath: /dev/shm
  - name: tmp
    mountPath: /tmp
  {{- if $training.tokenSecret.name }}
  - name: secrets
    mountPath: /run/secrets/loractl
    readOnly: true
  {{- end }}
  {{- if $training.model.existingClaim }}
  - name: models
    mountPath: /models
    readOnly: true
  {{- end }}
  {{- if $training.data.existingClaim }}
  - name: data
    mountPath: /data
    readOnly: true
  {{- end }}
{{- end -}}

{{- define "loractl.training.pod" -}}
{{- $training := .Values.training -}}
serviceAccountName: {{ include "loractl.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
# A checkpoint is written on SIGTERM; the run goes on from it.
terminationGracePeriodSeconds: 120
{{- include "loractl.scheduling" (dict "root" $ "part" $training) }}
volumes:
  - name: recipe
    configMap:
      name: {{ include "loractl.training.name" . }}
  - name: out
    persistentVolumeClaim:
      claimName: {{ default (printf "%s-training" (include "loractl.fullname" .)) $training.output.existingClaim }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $training.shmSize }}
  - name: tmp
    emptyDir:
      sizeLimit: {{ $training.tmpSize }}
  {{- with $training.tokenSecret }}
  {{- if .name }}
  - name: secrets
    secret:
      secretName: {{ .name }}
      defaultMode: 0440
      items:
        - key: {{ .key }}
          path: hub-token
  {{- end }}
  {{- end }}
  {{- with $training.model.existingClaim }}
  - name: models
    persistentVolumeClaim:
      claimName: {{ . }}
      readOnly: true
  {{- end }}
  {{- with $training.data.existingClaim }}
  - name: data
    persistentVolumeClaim:
      claimName: {{ . }}
      readOnly: true
  {{- end }}
{{- end -}}

{{/* A Job cannot be changed, so a new recipe gets a new name; the old Job goes with the upgrade. */}}
{{- define "loractl.training.name" -}}
{{- printf "%s-training-%s" (include "loractl.fullname" .) (toJson .Values.training.recipe | sha256sum | trunc 8) -}}
{{- end -}}
