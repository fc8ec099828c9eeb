{{/* Small objects that each role has one of. All take (list $ "role"). */}}

{{- define "sdar.serviceAccount" -}}
{{- if include "sdar.isPresent" . -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "sdar.metadata" . | nindent 2 }}
  {{- with (include "sdar.podValues" . | fromYaml).serviceAccount.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- end }}

{{/*
One pod of a role at a time may be moved: each comes back without a loss, but not all at once.
*/}}
{{- define "sdar.podDisruptionBudget" -}}
{{- if include "sdar.isPresent" . -}}
{{- $root := index . 0 -}}
{{- $isOld := not ($root.Capabilities.APIVersions.Has "policy/v1") -}}
apiVersion: policy/{{ $isOld | ternary "v1beta1" "v1" }}
kind: PodDisruptionBudget
metadata: {{- include "sdar.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  {{- if semverCompare ">=1.27-0" $root.Capabilities.KubeVersion.Version }}
  # Else the one pod of a role could not leave its node while it is not ready, without end if it
  # never will be.
  unhealthyPodEvictionPolicy: AlwaysAllow
  {{- end }}
  selector:
    matchLabels: {{- include "sdar.selector" . | nindent 6 }}
{{- end }}
{{- end }}

{{/*
A Deployment. `surge` is how many pods more than the size an update may make: 0 where a replacement
waits for the place, and the GPU, of the pod that it replaces. Takes (list $ "role" surge).
*/}}
{{- define "sdar.deployment" -}}
{{- $surge := index . 2 -}}{{- $role := initial . -}}
{{- if include "sdar.isPresent" $role -}}
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "sdar.metadata" $role | nindent 2 }}
spec:
  {{- with include "sdar.replicas" $role }}
  {{ . }}
  {{- end }}
  strategy:
    rollingUpdate: {maxSurge: {{ $surge }}, maxUnavailable: {{ sub 1 $surge }}}
  selector:
    matchLabels: {{- include "sdar.selector" $role | nindent 6 }}
  template: {{- include "sdar.pod" $role | nindent 4 }}
{{- end }}
{{- end }}

{{/* A Service with the ports that a role listens on. */}}
{{- define "sdar.service" -}}
{{- if include "sdar.isPresent" . -}}
{{- $ports := (include "sdar.role" . | fromYaml).ports -}}
apiVersion: v1
kind: Service
metadata: {{- include "sdar.metadata" . | nindent 2 }}
spec:
  {{- if eq (index . 1) "envs" }}
  # Headless: callers see every pod and spread their sessions over them.
  clusterIP: None
  {{- end }}
  selector: {{- include "sdar.selector" . | nindent 4 }}
  ports:
    {{- range $name := list "http" "grpc" "probe" }}
    {{- with get $ports $name }}
    - {name: {{ $name }}, port: {{ . }}, targetPort: {{ $name }}, protocol: TCP}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}

{{/* Peers for network policies: pods of the release by role. Takes (list $ "role" "role" ...). */}}
{{- define "sdar.peers" -}}
{{- $root := first . -}}
{{- range $index, $role := rest . -}}
{{- if $index }}{{ "\n" }}{{ end -}}
- podSelector:
    matchLabels: {{- include "sdar.selector" (list $root $role) | nindent 6 }}
{{- end }}
{{- end }}

{{/* Head of a role's network policy. */}}
{{- define "sdar.networkPolicyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{- include "sdar.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels: {{- include "sdar.selector" . | nindent 6 }}
{{- end }}

{{/* Prometheus may read a role's /metrics. Takes (list $ "role"). */}}
{{- define "sdar.scrapeIngress" -}}
- from: {{- toYaml (index . 0).Values.networkPolicy.prometheus | nindent 4 }}
  ports: [{port: {{ include "sdar.port" . }}}]
{{- end }}

{{/*
Ways out that most roles have: Redis, S3 and the model hub where they are outside the release. Takes
(list $ "role").
*/}}
{{- define "sdar.commonEgress" -}}
{{- $root := index . 0 -}}
{{- $readsWeights := (include "sdar.role" . | fromYaml).readsWeights -}}
{{- if $root.Values.redis.enabled -}}
- to: {{- include "sdar.peers" (list $root "redis") | nindent 4 }}
  ports: [{port: 6379}]
{{- else -}}
- ports: [{port: {{ include "sdar.redisPort" $root }}}]
{{- end }}
{{- if $root.Values.tracing.endpoint }}
- ports: [{port: {{ include "sdar.portOf" (list $root.Values.tracing.endpoint 4317) }}}]
{{- end }}
{{- if or (include "sdar.isHubModel" $root) (and $readsWeights $root.Values.storage.weightsUrl) }}
# The model hub, or the bucket of the weights; never the cloud's own metadata service.
- to:
    - ipBlock: {cidr: 0.0.0.0/0, except: [169.254.169.254/32]}
    - ipBlock: {cidr: "::/0", except: ["fd00:ec2::254/128"]}
  ports: [{port: 443}]
{{- end }}
{{- end }}

{{/* Way to the environments: the release's own pods, or the address that the run names. */}}
{{- define "sdar.envsEgress" -}}
{{- if include "sdar.hasEnvs" . -}}
- to: {{- include "sdar.peers" (list . "envs") | nindent 4 }}
  ports: [{port: {{ include "sdar.port" (list . "envs" "grpc") }}}]
{{- else -}}
- ports: [{port: {{ regexFind "[0-9]+$" (include "sdar.run" . | fromYaml).environment.address }}}]
{{- end }}
{{- end }}

{{- define "sdar.redisPort" -}}
{{- include "sdar.portOf" (list .Values.redis.url .Values.redis.port) -}}
{{- end }}

{{/* Port of a URL, or the one that is usual. A host may end in a digit. */}}
{{- define "sdar.portOf" -}}
{{- $host := get (urlParse (index . 0)) "host" -}}
{{- regexFind ":[0-9]+$" $host | trimPrefix ":" | default (index . 1) -}}
{{- end }}
