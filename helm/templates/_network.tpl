{{/* What every FastServe pod may reach: names, and where traces go. */}}
{{- define "fastserve.commonEgress" -}}
- ports: # 5353: behind the Service of OpenShift's DNS
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    - {port: 5353, protocol: UDP}
    - {port: 5353, protocol: TCP}
  {{- with .Values.networkPolicy.dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
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
