{{/* What every FastServe pod may reach: names, and where traces go. */}}
{{- define "fastserve.commonEgress" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
  to:
    {{- toYaml .Values.networkPolicy.dnsTo | nindent 4 }}
{{- if .Values.otel.endpoint }}
- ports: [{port: {{ .Values.otel.endpoint | urlParse | dig "host" "" | regexFind "[0-9]+$" | default "4317" | int }}, protocol: TCP}]
  {{- with .Values.networkPolicy.otelTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if include "fastserve.otlpEndpoint" . }}
- ports: [{port: 4317, protocol: TCP}]
  to:
    - podSelector:
        matchLabels:
          {{- include "fastserve.selector" (dict "root" . "component" (ternary "collector" "jaeger" .Values.collector.enabled)) | nindent 10 }}
{{- end }}
{{- end }}

{{/* root, ports */}}
{{- define "fastserve.metricsIngress" -}}
- ports:
    {{- range .ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .root.Values.networkPolicy.metricsFrom }}
  from:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
