{{/* A volume `cache` that several pods may share: a claim of the user's or a folder of the node. */}}
{{- define "fastserve.sharedCache" -}}
{{- $cache := .source.cache -}}
- name: cache
  {{- if eq $cache.type "hostPath" }}
  hostPath: {path: {{ $cache.hostPath | quote }}, type: DirectoryOrCreate}
  {{- else if eq $cache.type "pvc" }}
  persistentVolumeClaim: {claimName: {{ $cache.existingClaim }}}
  {{- else }}
  emptyDir:
    {{- with $cache.sizeLimit }}
    sizeLimit: {{ . }}
    {{- else }} {}
    {{- end }}
  {{- end }}
{{- end }}

{{/* it, labels, values, name */}}
{{- define "fastserve.disruptionBudget" }}
{{- if .values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .it.base }}-{{ .name }}
  labels:
    {{- include "fastserve.labels" .labels | nindent 4 }}
spec:
  maxUnavailable: {{ include "fastserve.text" .values.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "fastserve.selector" .labels | nindent 6 }}
{{- end }}
{{- end }}

{{/* it, name of the template, size, storageClass */}}
{{- define "fastserve.claim" -}}
- metadata: {name: {{ .name }}}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ .size }}}}
{{- end }}
