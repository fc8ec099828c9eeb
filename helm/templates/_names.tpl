{{/*
What things are called, and which of them a run has. Templates that are about one role take
(list $ "role").
*/}}

{{/*
Prefix of every object's name: with -learner behind it 52 characters, the most of which a
StatefulSet's pods can be labelled.
*/}}
{{- define "sdar.fullname" -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- $own := contains "sdar" $release | ternary $release (printf "%s-sdar" $release) -}}
{{- .Values.fullnameOverride | default $own | trunc 44 | trimSuffix "-" -}}
{{- end }}

{{- define "sdar.name" -}}
{{- printf "%s-%s" (include "sdar.fullname" (index . 0)) (index . 1) -}}
{{- end }}

{{/* The run's name, which also names its keys in Redis. */}}
{{- define "sdar.runName" -}}
{{- .Values.run.name | default (.Release.Name | replace "." "-") -}}
{{- end }}

{{- define "sdar.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{ include "sdar.selector" . }}
{{- end }}

{{- define "sdar.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: sdar
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/*
Of pods: without the chart's version, since a new chart that changes nothing else restarts nothing.
*/}}
{{- define "sdar.podLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/version: {{ $root.Values.image.tag | default $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{ include "sdar.selector" . }}
{{- end }}

{{/* Object metadata of a role: name and labels. */}}
{{- define "sdar.metadata" -}}
name: {{ include "sdar.name" . }}
labels: {{- include "sdar.labels" . | nindent 2 }}
{{- end }}

{{/*
What a role's pod has: `podDefaults` under what its own section says. Maps are merged; a list, a
text or a number of the role's replaces the default, and an empty one does so too.
*/}}
{{- define "sdar.podValues" -}}
{{- $values := (index . 0).Values -}}{{- $own := index $values (index . 1) -}}
{{- mergeOverwrite (deepCopy ($values.podDefaults | default dict)) (deepCopy $own) | toYaml -}}
{{- end }}

{{/* The table of services, or its row of one role: files/roles.yaml says what each key means. */}}
{{- define "sdar.roles" -}}
{{- .Files.Get "files/roles.yaml" -}}
{{- end }}

{{- define "sdar.role" -}}
{{- get (include "sdar.roles" (index . 0) | fromYaml) (index . 1) | toYaml -}}
{{- end }}

{{/* A port's number. Takes (list $ "role" "grpc"), or no name for the one that is probed. */}}
{{- define "sdar.port" -}}
{{- $role := include "sdar.role" . | fromYaml -}}
{{- get $role.ports (rest . | rest | first | default $role.probePort) -}}
{{- end }}

{{/* Where a role is called: its gRPC, or the port that is named. Takes what sdar.port does. */}}
{{- define "sdar.address" -}}
{{- include "sdar.name" . }}:{{ include "sdar.port" (append . "grpc") -}}
{{- end }}

{{/* "true" if the release has pods of a role. Takes (list $ "role"). */}}
{{- define "sdar.isPresent" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- if eq $role "redis" }}{{ if $root.Values.redis.enabled }}true{{ end }}
{{- else }}{{ include "sdar.has" (list $root (include "sdar.role" . | fromYaml).presence) }}{{ end -}}
{{- end }}

{{/*
"true" if the run is one of those that have such roles and calls. Takes (list $ "presence"), which
files/roles.yaml has of each role and call.
*/}}
{{- define "sdar.has" -}}
{{- $root := index . 0 -}}{{- $presence := index . 1 -}}
{{- $method := include "sdar.method" $root | fromYaml -}}
{{- if eq $presence "always" }}true
{{- else if eq $presence "with_teacher" }}{{ if $method.runs_teacher }}true{{ end }}
{{- else if eq $presence "with_shown_skills" }}{{ if $method.student_sees_skills }}true{{ end }}
{{- else if eq $presence "with_own_environment" }}{{ include "sdar.hasEnvs" $root }}
{{- else }}{{ fail (printf "sdar.has knows no presence %s" $presence) }}{{ end -}}
{{- end }}

{{- define "sdar.image" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $image := $root.Values.image -}}
{{- $tag := $image.tag | default $root.Chart.AppVersion -}}
{{- if (index $root.Values $role).gpus -}}
{{- $tag = $image.gpuTag | default (printf "%s-cuda" $tag) -}}
{{- end -}}
{{- /* The teacher's own image has no vLLM; the rollout's holds all that the teacher needs. */ -}}
{{- $scorer := (include "sdar.run" $root | fromYaml).teacher.scorer -}}
{{- $name := and (eq $role "teacher") (eq $scorer "vllm") | ternary "rollout" $role -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}sdar-{{ $name }}:{{ $tag }}
{{- end }}

{{/*
The run, as services read it. One that names its environment is all that `run` says and nothing
else; otherwise it is the demo, with the keys that `run` has in place of the demo's.
*/}}
{{- define "sdar.writtenRun" -}}
{{- $standsAlone := dig "environment" "name" "" .Values.run | empty | not -}}
{{- $base := ternary dict (.Files.Get "files/household.yaml" | fromYaml) $standsAlone -}}
{{- $name := dict "name" (include "sdar.runName" .) -}}
{{- mergeOverwrite $base (deepCopy .Values.run) $name | toYaml -}}
{{- end }}

{{/* The same over the defaults of RunConfig: for looking at, never handed to a service. */}}
{{- define "sdar.run" -}}
{{- $defaults := .Files.Get "files/run-defaults.yaml" | fromYaml -}}
{{- mergeOverwrite $defaults (include "sdar.writtenRun" . | fromYaml) | toYaml -}}
{{- end }}

{{/* The row of the run's method in files/methods.yaml. */}}
{{- define "sdar.method" -}}
{{- $methods := .Files.Get "files/methods.yaml" | fromYaml -}}
{{- get $methods (include "sdar.run" . | fromYaml).method.name | toYaml -}}
{{- end }}

{{/* Whether trajectories pass the teacher. */}}
{{- define "sdar.isScoring" -}}
{{- if (include "sdar.method" . | fromYaml).needs_teacher }}true{{ end -}}
{{- end }}

{{/* Whether the run names no environment elsewhere. */}}
{{- define "sdar.hasEnvs" -}}
{{- if not (include "sdar.run" . | fromYaml).environment.address }}true{{ end -}}
{{- end }}

{{/* A hub name is fetched when a pod starts; a directory is in the image or on a volume. */}}
{{- define "sdar.isHubModel" -}}
{{- $path := (include "sdar.run" . | fromYaml).model.path | default "/" -}}
{{- if not (hasPrefix "/" $path) }}true{{ end -}}
{{- end }}

{{/*
Whether pods of a role need the claim: all that read weights, unless these are in a bucket; the
learner's checkpoints always are on it.
*/}}
{{- define "sdar.usesClaim" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $readsWeights := (include "sdar.role" . | fromYaml).readsWeights -}}
{{- $isBucket := $root.Values.storage.weightsUrl -}}
{{- if or (eq $role "learner") (and $readsWeights (not $isBucket)) }}true{{ end -}}
{{- end }}

{{- define "sdar.claimName" -}}
{{- .Values.storage.existingClaim | default (include "sdar.name" (list . "data")) -}}
{{- end }}

{{- define "sdar.redisSecret" -}}
{{- .Values.redis.existingSecret | default (include "sdar.name" (list . "redis")) -}}
{{- end }}

{{/* Processes of a learner's pod. */}}
{{- define "sdar.ranksPerPod" -}}
{{- $run := include "sdar.run" . | fromYaml -}}
{{- div (int $run.training.num_ranks) (int .Values.learner.replicas) -}}
{{- end }}

{{/*
The number of pods, where the chart decides it: not where the gateway or KEDA does. A dry run leaves
it as it is.
*/}}
{{- define "sdar.replicas" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}{{- $scaling := $root.Values.autoscaling -}}
{{- $isGatewayScaled := or (eq $scaling.mode "gateway") (eq $role "learner") -}}
{{- $isScaled := or $isGatewayScaled (include "sdar.isKedaScaled" .) -}}
{{- if or (eq $scaling.mode "none") $scaling.dryRun (not $isScaled) -}}
{{- $replicas := (index $root.Values $role).replicas -}}
{{- if ne $role "learner" }}{{ $replicas = $replicas.min }}{{ end -}}
{{- if $scaling.dryRun -}}
{{- $kind := ternary "StatefulSet" "Deployment" (eq $role "learner") -}}
{{- with lookup "apps/v1" $kind $root.Release.Namespace (include "sdar.name" .) -}}
{{- $replicas = .spec.replicas | default $replicas -}}
{{- end -}}
{{- end -}}
replicas: {{ $replicas }}
{{- end -}}
{{- end }}
