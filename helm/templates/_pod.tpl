{{/*
The pod of a role: what all roles have in common is here once, what differs is in files/roles.yaml
and podDefaults. All take (list $ "role").
*/}}

{{- define "sdar.pod" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $values := include "sdar.podValues" . | fromYaml -}}
metadata:
  labels: {{- include "sdar.podLabels" . | nindent 4 }}
  annotations:
    checksum/config: {{ include "sdar.configChecksum" . }}
    {{- with $values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "sdar.name" . }}
  automountServiceAccountToken: {{ include "sdar.isScaler" . | eq "true" }}
  # Kubernetes would set SDAR_..._PORT variables of its own for each Service.
  enableServiceLinks: false
  {{- if include "sdar.isTorchrun" . }}
  # A torchrun that is process 1 and waits for the others would not hear SIGTERM.
  shareProcessNamespace: true
  {{- end }}
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  {{- with include "sdar.podPlacement" . | trim }}{{ . | nindent 2 }}{{ end }}
  securityContext: {{- include "sdar.podSecurity" . | nindent 4 }}
  containers:
    - name: {{ $role }}
      image: {{ include "sdar.image" . }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- include "sdar.command" . | nindent 6 }}
      env: {{- include "sdar.env" . | nindent 8 }}
      {{- with $root.Values.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      ports: {{- include "sdar.ports" . | trim | nindent 8 }}
      {{- include "sdar.probes" . | nindent 6 }}
      resources: {{- include "sdar.resources" . | nindent 8 }}
      securityContext: {{- include "sdar.containerSecurity" . | nindent 8 }}
      volumeMounts: {{- include "sdar.volumeMounts" . | nindent 8 }}
  volumes: {{- include "sdar.volumes" . | nindent 4 }}
{{- end }}

{{/* Where pods run, which the redis pod shares. */}}
{{- define "sdar.podPlacement" -}}
{{- $root := index . 0 -}}{{- $selector := include "sdar.selector" . -}}
{{- $values := include "sdar.podValues" . | fromYaml -}}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with merge (deepCopy $values.affinity) (include "sdar.claimAffinity" . | fromYaml) }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- $selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/*
Pods that share a claim which one node at a time can mount go to one node; elsewhere they would wait
for it without end.
*/}}
{{- define "sdar.claimAffinity" -}}
{{- $root := index . 0 -}}{{- $storage := $root.Values.storage -}}
{{- $isShared := and (include "sdar.usesClaim" .) (not $storage.weightsUrl) -}}
{{- $isForSeveral := or $storage.existingClaim (has "ReadWriteMany" $storage.accessModes) -}}
{{- if and $isShared (not $isForSeveral) -}}
podAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels: {{- include "sdar.selector" (list $root "") | nindent 10 }}
        matchExpressions:
          - key: app.kubernetes.io/component
            operator: In
            values:
              {{- range $role, $row := include "sdar.roles" $root | fromYaml }}
              {{- if $row.readsWeights }}
              - {{ $role }}
              {{- end }}
              {{- end }}
{{- end }}
{{- end }}

{{/* The "restricted" level of Kubernetes' pod security standards, for every pod of the chart. */}}
{{- define "sdar.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "sdar.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* "true" for the one that changes sizes, by the API server and a file that says within what. */}}
{{- define "sdar.isScaler" -}}
{{- $mode := (index . 0).Values.autoscaling.mode -}}
{{- if and (eq (index . 1) "gateway") (ne $mode "none") }}true{{ end -}}
{{- end }}

{{/* A learner of several pods is started by torchrun, and any pod's number is its place. */}}
{{- define "sdar.isTorchrun" -}}
{{- $learners := int (index . 0).Values.learner.replicas -}}
{{- if and (eq (index . 1) "learner") (gt $learners 1) }}true{{ end -}}
{{- end }}

{{- define "sdar.command" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $values := include "sdar.podValues" . | fromYaml -}}
{{- if include "sdar.isTorchrun" . -}}
{{- $learner := include "sdar.name" . -}}
command:
  - sh
  - -c
  - >-
    exec torchrun --nnodes={{ $values.replicas }}
    --nproc-per-node={{ include "sdar.ranksPerPod" $root }}
    --node-rank=${HOSTNAME##*-} --master-addr={{ $learner }}-0.{{ $learner }} --master-port=29500
    --rdzv-conf=timeout={{ $values.startupSeconds }} --max-restarts=0
    --shutdown-timeout={{ sub (int $values.terminationGracePeriodSeconds) 20 }}
    --no-python sdar serve learner
{{- else -}}
args: [serve, {{ $role }}]
{{- end -}}
{{- end }}

{{- define "sdar.ports" -}}
{{- $ports := (include "sdar.role" . | fromYaml).ports -}}
{{- range $name := list "http" "probe" "grpc" }}
{{- with get $ports $name }}
- {name: {{ $name }}, containerPort: {{ . }}, protocol: TCP}
{{- end }}
{{- end }}
{{- end }}

{{/*
The startup probe covers the engine's start and the wait for a first policy, in which a main loop
may rightly be silent. The gateway is up before the others are, and ready after them.
*/}}
{{- define "sdar.probes" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}{{- $isGateway := eq $role "gateway" -}}
{{- $startup := (include "sdar.podValues" . | fromYaml).startupSeconds -}}
{{- $port := (include "sdar.role" . | fromYaml).probePort -}}
{{- $scheme := and $isGateway $root.Values.tls.enabled | ternary "HTTPS" "HTTP" -}}
startupProbe:
  httpGet:
    path: {{ $isGateway | ternary "/healthz" "/readyz" }}
    port: {{ $port }}
    scheme: {{ $scheme }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (int $startup) 5 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "sdar.resources" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- $resources := deepCopy $values.resources -}}
{{- if $values.gpus -}}
{{- $gpus := dict "nvidia.com/gpu" (int $values.gpus) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpus) -}}
{{- end -}}
{{- include "sdar.quantities" $resources -}}
{{- end }}

{{/*
Requests and limits, all of them texts: older API servers take no number where a server-side apply,
Helm 4's, has one.
*/}}
{{- define "sdar.quantities" -}}
{{- $texts := dict -}}
{{- range $kind, $amounts := . -}}
{{- $of := dict -}}
{{- range $name, $amount := $amounts -}}{{- $_ := set $of $name (toString $amount) -}}{{- end -}}
{{- $_ := set $texts $kind $of -}}
{{- end -}}
{{- toYaml $texts -}}
{{- end }}

{{- define "sdar.authEnv" -}}
- {name: SDAR_TOKENS_FILE, value: /etc/sdar-auth/tokens}
{{- if .Values.tls.enabled }}
- {name: SDAR_TLS_CERT, value: /etc/sdar-auth/tls.crt}
- {name: SDAR_TLS_KEY, value: /etc/sdar-auth/tls.key}
- {name: SDAR_TLS_CA, value: /etc/sdar-auth/ca.crt}
- {name: SDAR_TLS_CLIENT_AUTH, value: {{ .Values.tls.clientAuth }}}
{{- end }}
{{- end }}

{{- define "sdar.env" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}{{- $values := $root.Values -}}
{{- $row := include "sdar.role" . | fromYaml -}}
- {name: SDAR_CONFIG, value: /etc/sdar/run.yaml}
- name: SDAR_INSTANCE
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- {name: SDAR_HOST, value: 0.0.0.0}
- {name: SDAR_LOG_FORMAT, value: json}
- {name: SDAR_LOG_LEVEL, value: {{ $values.logLevel }}}
- {name: SDAR_CACHE, value: /var/cache/sdar}
{{ include "sdar.authEnv" $root }}
{{- if $row.usesRedis }}
- name: SDAR_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ include "sdar.redisSecret" $root }}, key: redis-url}
{{- end }}
{{- range $row.calls }}
{{- if and (not .isTold) (include "sdar.has" (list $root .presence)) }}
- {name: SDAR_{{ upper .role }}_ADDRESS, value: "{{ include "sdar.address" (list $root .role) }}"}
{{- end }}
{{- end }}
{{- if $row.readsWeights }}
- name: SDAR_WEIGHTS_URL
  value: {{ $values.storage.weightsUrl | default "/var/lib/sdar" | quote }}
{{- end }}
{{- if eq $role "learner" }}
- {name: SDAR_CHECKPOINTS, value: /var/lib/sdar/checkpoints/{{ include "sdar.runName" $root }}}
{{- end }}
{{- if include "sdar.isScaler" . }}
- {name: SDAR_SCALING, value: /etc/sdar-scaling/scaling.yaml}
{{- end }}
{{- if not (include "sdar.isHubModel" $root) }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if and $values.tracing.endpoint $row.usesRedis }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ $values.tracing.endpoint | quote }}}
- {name: SDAR_TRACE_SHARE, value: {{ $values.tracing.share | quote }}}
{{- end }}
{{- if $row.drains }}
# The rest of the grace period is for handing back what is left.
- name: SDAR_DRAIN_S
  value: {{ sub (int (index $values $role).terminationGracePeriodSeconds) 30 | quote }}
{{- end }}
{{- with (include "sdar.podValues" . | fromYaml).env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sdar.volumeMounts" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
- {name: run, mountPath: /etc/sdar, readOnly: true}
- {name: auth, mountPath: /etc/sdar-auth, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /var/cache/sdar}
{{- if hasKey (index $root.Values $role) "shmSize" }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if include "sdar.usesClaim" . }}
- {name: data, mountPath: /var/lib/sdar{{ if ne $role "learner" }}, readOnly: true{{ end }}}
{{- end }}
{{- if include "sdar.isScaler" . }}
- {name: scaling, mountPath: /etc/sdar-scaling, readOnly: true}
{{- end }}
{{- with $root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sdar.volumes" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
- name: run
  configMap: {name: {{ include "sdar.name" (list $root "run") }}}
{{ include "sdar.authVolume" $root }}
- name: tmp
  emptyDir: {}
- name: cache
  emptyDir: {}
{{- with (index $root.Values $role).shmSize }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- if include "sdar.usesClaim" . }}
- name: data
  persistentVolumeClaim:
    claimName: {{ include "sdar.claimName" $root }}
{{- end }}
{{- if include "sdar.isScaler" . }}
- name: scaling
  configMap: {name: {{ include "sdar.name" (list $root "scaling") }}}
{{- end }}
{{- with $root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Tokens and certificates in one directory, whichever Secrets they come from. */}}
{{- define "sdar.authVolume" -}}
- name: auth
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ .Values.auth.existingSecret | default (include "sdar.name" (list . "auth")) }}
          items: [{key: tokens, path: tokens}]
      {{- if .Values.tls.enabled }}
      - secret:
          name: {{ .Values.tls.existingSecret | default (include "sdar.name" (list . "tls")) }}
          items:
            {{- range list "tls.crt" "tls.key" "ca.crt" }}
            - {key: {{ . }}, path: {{ . }}}
            {{- end }}
      {{- end }}
{{- end }}

{{/*
Of the keys of the run that a role reads: a changed one restarts its pods. `sdar.run` fills in the
defaults, so that writing a default down restarts nothing.
*/}}
{{- define "sdar.configChecksum" -}}
{{- $root := index . 0 -}}
{{- $run := include "sdar.run" $root | fromYaml -}}
{{- $read := list $root.Values.redis.url -}}
{{- range $key := (include "sdar.role" . | fromYaml).configKeys -}}
{{- $read = append $read (dict $key (include "sdar.readRun" (list $run $key) | fromJson).value) -}}
{{- end -}}
{{- toJson $read | sha256sum -}}
{{- end }}
