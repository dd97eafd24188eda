{{/* Environment of every FastServe container: it, component, settings. */}}
{{- define "fastserve.env" -}}
- {name: FASTSERVE_SHUTDOWN_TIMEOUT, value: {{ .shutdownTimeout | int | quote }}}
{{- if and .it.root.Values.tls.enabled .component }}
- {name: FASTSERVE_TLS_CERT, value: /etc/fastserve/tls/tls.crt}
- {name: FASTSERVE_TLS_KEY, value: /etc/fastserve/tls/tls.key}
- {name: FASTSERVE_TLS_CA, value: /etc/fastserve/tls/ca.crt}
{{- $called := ternary "scheduler" "worker" (eq .component "gateway") }}
- {name: FASTSERVE_TLS_SERVER_NAME, value: {{ .it.base }}-{{ $called }}.{{ .it.root.Release.Namespace }}.svc}
{{- end }}
{{- with include "fastserve.otlpEndpoint" .it.root }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
- {name: OTEL_EXPORTER_OTLP_INSECURE, value: {{ $.it.root.Values.otel.insecure | quote }}}
- {name: OTEL_TRACES_SAMPLER, value: {{ $.it.root.Values.otel.sampler | quote }}}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ $.it.root.Values.otel.samplerArg | quote }}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.namespace.name={{ $.it.root.Release.Namespace }},fastserve.model={{ $.it.model }}"}
{{- end }}
{{- range $name, $value := .settings }}
{{- if not (kindIs "invalid" $value) }}
- {name: FASTSERVE_{{ upper $name }}, value: {{ include "fastserve.text" $value | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* What all pods have in common: it, component (the values of it), name. */}}
{{- define "fastserve.podBasics" -}}
enableServiceLinks: false # a Service named fastserve would set FASTSERVE_PORT
automountServiceAccountToken: {{ default false .token }}
serviceAccountName: {{ .account | default (include "fastserve.serviceAccount" .root) }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Replicas on different nodes if that can be, unless it is said otherwise. */}}
{{- define "fastserve.spread" -}}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "fastserve.selector" .labels | nindent 8 }}
{{- end }}
{{- end }}

{{- define "fastserve.podMetadata" -}}
labels:
  {{- include "fastserve.labels" .labels | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* gRPC probes on the plain health port: port, ready and live (names in the health service). */}}
{{- define "fastserve.grpcProbes" -}}
startupProbe:
  grpc: {port: {{ .port }}, service: {{ .ready | quote }}}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .startupSeconds) 1) 2 }}
readinessProbe:
  grpc: {port: {{ .port }}, service: {{ .ready | quote }}}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  grpc: {port: {{ .port }}, service: live}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{- define "fastserve.preStop" -}}
lifecycle:
  preStop:
    sleep: {seconds: {{ int .preStopSeconds }}}
{{- end }}

{{/* Loads a model from Hugging Face: it, service, own (image), tokenizerOnly. */}}
{{- define "fastserve.download" -}}
- name: download
  image: {{ include "fastserve.image" (dict "root" .it.root "service" .service "own" .own) }}
  imagePullPolicy: {{ include "fastserve.pullPolicy" (dict "root" .it.root "own" .own) }}
  command: [python, -m, fastserve.common.download]
  args:
    - {{ .it.source.id | quote }}
    - --into={{ include "fastserve.modelPath" .it }}
    - --revision={{ .it.source.revision }}
    {{- if .tokenizerOnly }}
    - --tokenizer-only
    {{- end }}
  env:
    - {name: HF_HOME, value: /tmp/huggingface}
    - {name: HF_HUB_OFFLINE, value: "0"}
    {{- with .it.root.Values.huggingface.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- if .it.root.Values.huggingface.existingSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ .it.root.Values.huggingface.existingSecret }}
          key: {{ .it.root.Values.huggingface.key }}
    {{- end }}
  resources:
    {{- toYaml .it.root.Values.huggingface.resources | nindent 4 }}
  securityContext:
    {{- toYaml .it.root.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: cache, mountPath: /cache}
{{- end }}

{{- define "fastserve.tlsMount" -}}
- {name: tls, mountPath: /etc/fastserve/tls, readOnly: true}
{{- end }}
