{{/* Names and labels. */}}
{{- define "fastserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Labels that select: root, component, and model but for what all models share. */}}
{{- define "fastserve.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .model }}
fastserve/model: {{ . }}
{{- end }}
{{- end }}

{{- define "fastserve.labels" -}}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: fastserve
{{ include "fastserve.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
The values of one model: what its entry of `models` says wins over the sections of the same name.
Takes a dict with root and entry, and adds to it: model (its name), base (of resource names), the
sections, and the ports.
*/}}
{{- define "fastserve.load" -}}
{{- $it := . -}}
{{- $_ := set $it "model" .entry.name -}}
{{- $_ := set $it "base" (printf "%s-%s" (include "fastserve.fullname" .root) .entry.name) -}}
{{- range $section := list "model" "gateway" "scheduler" "worker" "kvSidecar" "route" -}}
{{- $own := default dict (index $it.entry $section) -}}
{{- $key := ternary "source" $section (eq $section "model") -}}
{{- $_ := set $it $key (mergeOverwrite (deepCopy (index $it.root.Values $section)) (deepCopy $own)) -}}
{{- end -}}
{{- $_ := set $it "port" (include "fastserve.ports" . | fromYaml) -}}
{{- $_ := set $it "domain" (printf "%s.svc.%s" .root.Release.Namespace .root.Values.clusterDomain) -}}
{{- $tensor := int (default 1 $it.worker.settings.tensor_parallel_size) -}}
{{- $pipeline := int (default 1 $it.worker.settings.pipeline_parallel_size) -}}
{{- $_ := set $it "ranks" (mul $tensor $pipeline) -}}
{{- $_ := set $it "pods" (int $it.worker.podsPerGroup) -}}
{{- if kindIs "invalid" $it.kvSidecar.peers.enabled -}}
{{- $_ := set $it.kvSidecar.peers "enabled" (or (gt (int $it.worker.replicaCount) 1) $it.worker.autoscaling.enabled) -}}
{{- end -}}
{{- end }}

{{- define "fastserve.ports" -}}
http: 8000
scheduler: 7070
schedulerHealth: 7080
worker: 7071
workerHealth: 7081
peer: 7072
sidecarHealth: 7082
metrics: 9100
sidecarMetrics: 9101
rendezvous: 29500
redis: 6379
otlp: 4317
{{- end }}

{{/* host:port to listen on: root, port. */}}
{{- define "fastserve.listen" -}}
{{- $host := .root.Values.listenAddress -}}
{{- if contains ":" $host }}[{{ $host }}]{{ else }}{{ $host }}{{ end }}:{{ .port }}
{{- end }}

{{/* Image of a service: root, service, own (what the component says of its own). */}}
{{- define "fastserve.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (deepCopy (default dict .own)) -}}
{{- $own := default dict .own -}}
{{- $repository := $own.repository | default (printf "%s/%s" .root.Values.image.repository .service) -}}
{{- if $image.registry }}{{ $image.registry }}/{{ end -}}
{{- $repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "fastserve.pullPolicy" -}}
{{- (default dict .own).pullPolicy | default .root.Values.image.pullPolicy -}}
{{- end }}

{{/* Image of somebody else. */}}
{{- define "fastserve.foreignImage" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}

{{/* A value as text: whole numbers without an exponent, lists and maps as JSON. */}}
{{- define "fastserve.text" -}}
{{- if or (kindIs "slice" .) (kindIs "map" .) -}}
{{- toJson . -}}
{{- else if and (kindIs "float64" .) (eq . (floor .)) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end }}

{{/* Mebibytes of a quantity. */}}
{{- define "fastserve.mebi" -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- $unit := trimPrefix $number . -}}
{{- $factor := get (dict "Mi" 1 "Gi" 1024 "Ti" 1048576) $unit -}}
{{- if not $factor -}}
{{- fail (printf "the size %q must be a whole number with Mi, Gi or Ti" .) -}}
{{- end -}}
{{- mul $number $factor -}}
{{- end }}

{{/* Name in requests: of a loaded model. */}}
{{- define "fastserve.servedName" -}}
{{- .source.servedName | default (ternary .source.id .source.path (eq .source.source "huggingface") | base) -}}
{{- end }}

{{/* Folder of the model in the containers. */}}
{{- define "fastserve.modelPath" -}}
{{- if eq .source.source "huggingface" -}}
/cache/{{ .source.id | replace "/" "--" }}
{{- else if eq .source.source "volume" -}}
/cache/{{ .source.path | trimPrefix "/" }}
{{- else -}}
{{- .source.path -}}
{{- end -}}
{{- end }}

{{/* Worker pods or groups there can be at the most. */}}
{{- define "fastserve.maxGroups" -}}
{{- if .worker.autoscaling.enabled }}{{ max (int .worker.autoscaling.maxReplicas) (int .worker.autoscaling.minReplicas) }}{{ else }}{{ int .worker.replicaCount }}{{ end -}}
{{- end }}

{{/* Addresses of all rank 0 there can be, separated by commas. */}}
{{- define "fastserve.workerAddresses" -}}
{{- $it := . -}}
{{- $addresses := list -}}
{{- range $at := until (int (include "fastserve.maxGroups" .)) -}}
{{- $pod := ternary (printf "%s-worker-%d" $it.base $at) (printf "%s-worker-%d-0" $it.base $at) (eq $it.pods 1) -}}
{{- $addresses = append $addresses (printf "%s.%s-worker.%s:%v" $pod $it.base $it.domain $it.port.worker) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end }}

{{- define "fastserve.schedulerAddresses" -}}
{{- $it := . -}}
{{- $addresses := list -}}
{{- range $at := until (int .scheduler.replicaCount) -}}
{{- $addresses = append $addresses (printf "%s=%s-scheduler-%d.%s-scheduler.%s:%v" $it.model $it.base $at $it.base $it.domain $it.port.scheduler) -}}
{{- end -}}
{{- toJson $addresses -}}
{{- end }}

{{/* Where traces go; empty: nowhere. */}}
{{- define "fastserve.otlpEndpoint" -}}
{{- $name := include "fastserve.fullname" . -}}
{{- $domain := printf "%s.svc.%s" .Release.Namespace .Values.clusterDomain -}}
{{- if .Values.otel.endpoint -}}
{{- .Values.otel.endpoint -}}
{{- else if .Values.collector.enabled -}}
http://{{ $name }}-collector.{{ $domain }}:4317
{{- else if .Values.jaeger.enabled -}}
http://{{ $name }}-jaeger.{{ $domain }}:4317
{{- end -}}
{{- end }}

{{/* Seconds from SIGTERM, preStop included, to SIGKILL: component, others (seconds of sidecars). */}}
{{- define "fastserve.grace" -}}
{{- $needed := add (int .component.preStopSeconds) (int .component.shutdownTimeout) (int .others) -}}
{{- if kindIs "invalid" .component.terminationGracePeriodSeconds -}}
{{- add $needed 10 -}}
{{- else -}}
{{- if le (int .component.terminationGracePeriodSeconds) (int $needed) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %d, but preStop and shutdown take %d: leave it out, or make it longer" .name (int .component.terminationGracePeriodSeconds) (int $needed)) -}}
{{- end -}}
{{- int .component.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end }}

{{- define "fastserve.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else -}}
{{- ternary (include "fastserve.fullname" .) "default" .Values.serviceAccount.create -}}
{{- end -}}
{{- end }}

{{- define "fastserve.tlsSecret" -}}
{{- if .it.root.Values.tls.certManager.enabled -}}
{{ .it.base }}-{{ .component }}-tls
{{- else -}}
{{ index .it.root.Values.tls.existingSecrets .component }}
{{- end -}}
{{- end }}
