{{/*
Pod template of workers: it, labels. One pod is one rank if the model is not partitioned; else each
pod runs its share of the ranks under torchrun, and the pods of a group meet at the first of them.
*/}}
{{- define "fastserve.workerPod" -}}
{{- $it := .it -}}
{{- $ := .it.root -}}
{{- $worker := $it.worker -}}
{{- $sidecar := $it.kvSidecar -}}
{{- $local := div $it.ranks $it.pods -}}
metadata:
  {{- include "fastserve.podMetadata" (dict "labels" .labels "values" $worker) | nindent 2 }}
spec:
  {{- include "fastserve.podBasics" (dict "root" $ "values" $worker) | nindent 2 }}
  {{- include "fastserve.spread" (dict "labels" .labels "values" $worker) | nindent 2 }}
  {{- $others := ternary (int $sidecar.shutdownTimeout) 0 $sidecar.enabled }}
  terminationGracePeriodSeconds: {{ include "fastserve.grace" (dict "name" "worker" "component" $worker "others" $others) }}
  {{- if or (eq $it.source.source "huggingface") $sidecar.enabled }}
  initContainers:
    {{- if eq $it.source.source "huggingface" }}
    {{- include "fastserve.download" (dict "it" $it "service" "worker" "own" $worker.image) | nindent 4 }}
    {{- end }}
    {{- if $sidecar.enabled }}
    {{- include "fastserve.sidecar" (dict "it" $it "ranks" $local) | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "fastserve.image" (dict "root" $ "service" "worker" "own" $worker.image) }}
      imagePullPolicy: {{ include "fastserve.pullPolicy" (dict "root" $ "own" $worker.image) }}
      {{- if eq (int $it.ranks) 1 }}
      command: [python, -m, fastserve.worker]
      {{- else }}
      command: [python, -m, torch.distributed.run]
      args:
        - --nnodes={{ $it.pods }}
        - --nproc-per-node={{ $local }}
        {{- if gt (int $it.pods) 1 }}
        - --node-rank=$(NODE_RANK)
        - --master-addr=$(GROUP)-0.{{ $it.base }}-worker-ranks.{{ $it.domain }}
        {{- else }}
        - --master-addr=127.0.0.1
        {{- end }}
        - --master-port={{ $it.port.rendezvous }}
        - --max-restarts=0
        - -m
        - fastserve.worker
      {{- end }}
      {{- with $worker.extraArgs }}
      {{- if eq (int $it.ranks) 1 }}
      args:
      {{- end }}
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        - {name: FASTSERVE_LISTEN, value: {{ include "fastserve.listen" (dict "root" $ "port" $it.port.worker) | quote }}}
        - {name: FASTSERVE_HEALTH_LISTEN, value: {{ include "fastserve.listen" (dict "root" $ "port" $it.port.workerHealth) | quote }}}
        - {name: FASTSERVE_METRICS_HOST, value: {{ $.Values.listenAddress | quote }}}
        - {name: FASTSERVE_METRICS_PORT, value: {{ $it.port.metrics | quote }}}
        - name: FASTSERVE_WORKER_ID
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- if gt (int $it.pods) 1 }}
        - name: NODE_RANK
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
        - name: GROUP
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['fastserve/group']"}}
        {{- end }}
        - {name: FASTSERVE_MODEL, value: {{ include "fastserve.modelPath" $it | quote }}}
        - {name: FASTSERVE_SERVED_MODEL_NAME, value: {{ include "fastserve.servedName" $it | quote }}}
        {{- if $sidecar.enabled }}
        - {name: FASTSERVE_KV_OFFLOAD, value: "unix:/run/fastserve/kv-offload.sock"}
        {{- end }}
        {{- include "fastserve.env" (dict "it" $it "component" "worker" "settings" $worker.settings "shutdownTimeout" $worker.shutdownTimeout) | nindent 8 }}
        {{- with $worker.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $worker.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: {{ $it.port.worker }}}
        - {name: health, containerPort: {{ $it.port.workerHealth }}}
        - {name: metrics, containerPort: {{ $it.port.metrics }}}
      {{- include "fastserve.grpcProbes" (dict "port" $it.port.workerHealth "ready" "" "startupSeconds" $worker.startupSeconds) | nindent 6 }}
      {{- if int $worker.preStopSeconds }}
      {{- include "fastserve.preStop" $worker | nindent 6 }}
      {{- end }}
      resources:
        {{- toYaml $worker.resources | nindent 8 }}
      securityContext:
        {{- toYaml $.Values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: run, mountPath: /run/fastserve}
        {{- if ne $it.source.source "image" }}
        - {name: cache, mountPath: /cache, readOnly: true}
        {{- end }}
        {{- if $.Values.tls.enabled }}
        {{- include "fastserve.tlsMount" $it | nindent 8 }}
        {{- end }}
        {{- with $worker.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: run # the socket between worker and sidecar
      emptyDir: {}
    - name: shm # the KV blocks of preempted jobs, and what ranks exchange
      emptyDir:
        medium: Memory
        {{- $host := ternary (include "fastserve.mebi" $sidecar.hostMemory) "0" $sidecar.enabled }}
        sizeLimit: {{ add $host (include "fastserve.mebi" $worker.shmExtra) }}Mi
    {{- if and (ne $it.source.source "image") (ne (include "fastserve.claimsCache" $it) "true") }}
    {{- include "fastserve.sharedCache" $it | nindent 4 }}
    {{- end }}
    {{- if and $sidecar.enabled $sidecar.disk.enabled $sidecar.disk.ephemeral }}
    - name: disk
      emptyDir: {sizeLimit: {{ $sidecar.disk.size }}}
    {{- end }}
    {{- if $.Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "fastserve.tlsSecret" (dict "it" $it "component" "worker") }}}
    {{- end }}
    {{- if and $sidecar.enabled $sidecar.peers.enabled (not $.Values.tls.enabled) }}
    - name: peer-token
      secret: {secretName: {{ include "fastserve.peerSecret" $ }}}
    {{- end }}
    {{- with $worker.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Starts before the worker and stops after it: an init container that stays. */}}
{{- define "fastserve.sidecar" -}}
{{- $it := .it -}}
{{- $ := .it.root -}}
{{- $sidecar := $it.kvSidecar -}}
- name: kv-offload
  restartPolicy: Always
  image: {{ include "fastserve.image" (dict "root" $ "service" "kv-offload" "own" $sidecar.image) }}
  imagePullPolicy: {{ include "fastserve.pullPolicy" (dict "root" $ "own" $sidecar.image) }}
  command: [python, -m, fastserve.kv_offload]
  env:
    - {name: FASTSERVE_LISTEN, value: "unix:/run/fastserve/kv-offload.sock"}
    - {name: FASTSERVE_HEALTH_LISTEN, value: {{ include "fastserve.listen" (dict "root" $ "port" $it.port.sidecarHealth) | quote }}}
    - {name: FASTSERVE_METRICS_HOST, value: {{ $.Values.listenAddress | quote }}}
    - {name: FASTSERVE_METRICS_PORT, value: {{ $it.port.sidecarMetrics | quote }}}
    - {name: FASTSERVE_POOL_DIR, value: /dev/shm}
    - {name: FASTSERVE_HOST_MEMORY, value: {{ $sidecar.hostMemory }}B}
    {{- if gt (int .ranks) 1 }}
    - {name: FASTSERVE_WORKERS, value: {{ .ranks | quote }}}
    {{- end }}
    {{- if $sidecar.disk.enabled }}
    - {name: FASTSERVE_DISK_PATH, value: /var/lib/fastserve/disk}
    - {name: FASTSERVE_DISK_SIZE, value: {{ $sidecar.disk.size }}B}
    {{- end }}
    {{- if $sidecar.peers.enabled }}
    - {name: FASTSERVE_PEER_LISTEN, value: {{ include "fastserve.listen" (dict "root" $ "port" $it.port.peer) | quote }}}
    - name: POD_IP
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    {{- $ip := ternary "[$(POD_IP)]" "$(POD_IP)" (contains ":" $.Values.listenAddress) }}
    - {name: FASTSERVE_PEER_ADDRESS, value: "{{ $ip }}:{{ $it.port.peer }}"}
    {{- if not $.Values.tls.enabled }}
    - {name: FASTSERVE_PEER_TOKEN_FILE, value: /etc/fastserve/peers/token}
    {{- end }}
    {{- end }}
    {{- include "fastserve.env" (dict "it" $it "component" "worker" "settings" $sidecar.settings "shutdownTimeout" $sidecar.shutdownTimeout) | nindent 4 }}
  ports:
    - {name: kv-health, containerPort: {{ $it.port.sidecarHealth }}}
    - {name: kv-metrics, containerPort: {{ $it.port.sidecarMetrics }}}
    {{- if $sidecar.peers.enabled }}
    - {name: kv-peers, containerPort: {{ $it.port.peer }}}
    {{- end }}
  {{- include "fastserve.grpcProbes" (dict "port" $it.port.sidecarHealth "ready" "" "startupSeconds" $sidecar.startupSeconds) | nindent 2 }}
  resources:
    {{- toYaml $sidecar.resources | nindent 4 }}
  securityContext:
    {{- toYaml $.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    - {name: run, mountPath: /run/fastserve}
    {{- if $sidecar.disk.enabled }}
    - {name: disk, mountPath: /var/lib/fastserve/disk}
    {{- end }}
    {{- if $.Values.tls.enabled }}
    {{- include "fastserve.tlsMount" $it | nindent 4 }}
    {{- else if $sidecar.peers.enabled }}
    - {name: peer-token, mountPath: /etc/fastserve/peers, readOnly: true}
    {{- end }}
{{- end }}

{{- define "fastserve.peerSecret" -}}
{{- .Values.kvSidecar.peers.existingSecret | default (printf "%s-peers" (include "fastserve.fullname" .)) -}}
{{- end }}

{{/* Whether each pod gets a claim of its own for the model. */}}
{{- define "fastserve.claimsCache" -}}
{{- and (eq .source.source "huggingface") (eq .source.cache.type "pvc") (not .source.cache.existingClaim) -}}
{{- end }}
