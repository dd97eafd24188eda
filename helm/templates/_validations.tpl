{{/* What the schema cannot say. Each failure is one sentence that says what to do. */}}
{{- define "fastserve.validate" -}}
{{- $names := list }}
{{- range $entry := .Values.models }}
{{- $it := dict "root" $ "entry" $entry }}
{{- include "fastserve.load" $it }}
{{- if has $it.model $names }}
{{- fail (printf "models: two are named %s" $it.model) }}
{{- end }}
{{- $names = append $names $it.model }}
{{- include "fastserve.validateModel" $it }}
{{- end }}
{{- if and .Values.auth.enabled (not .Values.auth.existingSecret) }}
{{- fail "auth.enabled needs auth.existingSecret: a Secret whose key auth.key holds the API keys, one a line" }}
{{- end }}
{{- with .Values.redis }}
{{- if and .enabled (or .external.url .external.existingSecret) }}
{{- fail "redis.external is given: set redis.enabled=false, so that it is used instead of the bundled Valkey" }}
{{- end }}
{{- if not .enabled }}
{{- if not (or .external.url .external.existingSecret) }}
{{- fail "redis.enabled is false: name yours with redis.external.existingSecret, or with redis.external.url" }}
{{- end }}
{{- if and .external.url .external.existingSecret }}
{{- fail "redis.external: url and existingSecret are both given, but one of them must be it" }}
{{- end }}
{{- if regexMatch "://[^/]*:[^/]*@" .external.url }}
{{- fail "redis.external.url holds a password, which everybody can read: put the URL into a Secret and name it with redis.external.existingSecret" }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.tls }}
{{- if and .enabled (not .certManager.enabled) (not (and .existingSecrets.gateway .existingSecrets.scheduler .existingSecrets.worker)) }}
{{- fail "tls.enabled without cert-manager needs tls.existingSecrets.gateway, .scheduler and .worker" }}
{{- end }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs: the Gateway that the route belongs to" }}
{{- end }}
{{- if and .Values.collector.enabled (not .Values.jaeger.enabled) (not .Values.collector.exporter.endpoint) }}
{{- fail "collector.enabled: name where it sends traces with collector.exporter.endpoint, or set jaeger.enabled=true" }}
{{- end }}
{{- if and .Values.collector.enabled .Values.otel.endpoint }}
{{- fail "otel.endpoint is given, so nothing would use the collector: leave one of them out" }}
{{- end }}
{{- end }}

{{- define "fastserve.validateModel" -}}
{{- $at := printf "model %s" .model }}
{{- $longest := printf "%s-scheduler" .base }}
{{- if gt (len $longest) 52 }}
{{- fail (printf "%s: the name %s is longer than the 52 characters that a StatefulSet may have: choose a shorter release name, or set fullnameOverride" $at $longest) }}
{{- end }}
{{- $cache := .source.cache }}
{{- if and (eq .source.source "huggingface") (not .source.id) }}
{{- fail (printf "%s: model.source is huggingface: name the repository with model.id" $at) }}
{{- end }}
{{- if and (eq .source.source "volume") (not (or $cache.existingClaim (eq $cache.type "hostPath"))) }}
{{- fail (printf "%s: model.source is volume: name it with model.cache.existingClaim (type pvc), or use type hostPath" $at) }}
{{- end }}
{{- if and (eq $cache.type "hostPath") (not $cache.hostPath) }}
{{- fail (printf "%s: model.cache.type is hostPath: name the folder with model.cache.hostPath" $at) }}
{{- end }}
{{- if and $cache.existingClaim (ne $cache.type "pvc") }}
{{- fail (printf "%s: model.cache.existingClaim is used with model.cache.type=pvc alone" $at) }}
{{- end }}
{{- if .kvSidecar.enabled }}
{{- $host := include "fastserve.mebi" .kvSidecar.hostMemory | int }}
{{- with (default dict .kvSidecar.resources.limits).memory }}
{{- if lt (include "fastserve.mebi" . | int) (add $host 128 | int) }}
{{- fail (printf "%s: kvSidecar.hostMemory counts against the sidecar's memory limit of %s: raise kvSidecar.resources.limits.memory to 128Mi more than %s at least" $at . $.kvSidecar.hostMemory) }}
{{- end }}
{{- end }}
{{- if and .kvSidecar.disk.enabled (not .kvSidecar.disk.ephemeral) (ne .worker.kind "StatefulSet") }}
{{- fail (printf "%s: kvSidecar.disk.ephemeral=false needs worker.kind=StatefulSet, since other pods have no claims of their own" $at) }}
{{- end }}
{{- end }}
{{- if eq .worker.kind "Deployment" }}
{{- if ne .scheduler.discovery "kubernetes" }}
{{- fail (printf "%s: worker.kind=Deployment needs scheduler.discovery=kubernetes, since its pods have no stable names" $at) }}
{{- end }}
{{- if eq (include "fastserve.claimsCache" .) "true" }}
{{- fail (printf "%s: worker.kind=Deployment has no claim per pod: name a shared one with model.cache.existingClaim, or use another model.cache.type" $at) }}
{{- end }}
{{- end }}
{{- if gt (int .pods) 1 }}
{{- if ne (mod .ranks .pods) 0 }}
{{- fail (printf "%s: tensor_parallel_size x pipeline_parallel_size is %d, which cannot be shared equally among worker.podsPerGroup=%d pods" $at (int .ranks) (int .pods)) }}
{{- end }}
{{- if ne .worker.kind "StatefulSet" }}
{{- fail (printf "%s: worker.podsPerGroup needs worker.kind=StatefulSet, since ranks have stable names" $at) }}
{{- end }}
{{- if .worker.autoscaling.enabled }}
{{- fail (printf "%s: groups of several pods cannot be autoscaled: set worker.autoscaling.enabled=false and choose worker.replicaCount groups" $at) }}
{{- end }}
{{- end }}
{{- $local := div .ranks .pods | int }}
{{- $gpus := index (default dict .worker.resources.limits) "nvidia.com/gpu" }}
{{- if and $gpus (ne (int $gpus) $local) }}
{{- fail (printf "%s: each worker pod runs %d rank(s), which have a GPU each: set worker.resources.limits.nvidia\\.com/gpu to %d instead of %v, or change tensor_parallel_size, pipeline_parallel_size or worker.podsPerGroup" $at $local $local $gpus) }}
{{- end }}
{{- if and (gt (int .ranks) 1) (gt (int .worker.shutdownTimeout) 25) }}
{{- fail (printf "%s: torchrun gives ranks 30 seconds to end: set worker.shutdownTimeout to 25 or less" $at) }}
{{- end }}
{{- if .worker.autoscaling.enabled }}
{{- if lt (int .worker.autoscaling.maxReplicas) (int .worker.autoscaling.minReplicas) }}
{{- fail (printf "%s: worker.autoscaling.maxReplicas is less than minReplicas" $at) }}
{{- end }}
{{- end }}
{{- if and .gateway.autoscaling.enabled (lt (int .gateway.autoscaling.maxReplicas) (int .gateway.autoscaling.minReplicas)) }}
{{- fail (printf "%s: gateway.autoscaling.maxReplicas is less than minReplicas" $at) }}
{{- end }}
{{- if and .root.Values.ingress.enabled (ne .route.path "/") }}
{{- fail (printf "%s: an Ingress cannot strip the prefix route.path=%s: give the model a host of its own with route.hostnames, or use httpRoute" $at .route.path) }}
{{- end }}
{{- if and .root.Values.ingress.enabled (gt (len .root.Values.models) 1) (not .route.hostnames) }}
{{- fail (printf "%s: several models behind an Ingress need a host each: set route.hostnames" $at) }}
{{- end }}
{{- end }}
