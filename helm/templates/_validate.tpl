{{/*
Stops an installation with values that cannot work: by the rules of the run, and by those of the
chart, which values.schema.json cannot say because they are about several values at once.
*/}}
{{- define "sdar.validate" -}}
{{- $problems := list (include "sdar.problems" .) (include "sdar.brokenRules" .) | join "\n" -}}
{{- with regexReplaceAll "\n +" $problems " " | splitList "\n" | compact -}}
{{- fail (printf "\n\n  %s\n" (join "\n  " .)) -}}
{{- end -}}
{{- end }}

{{/*
What is wrong, a sentence a line, the lines of a long one indented. Each names its keys and says
what to do.
*/}}
{{- define "sdar.problems" -}}
{{- $run := include "sdar.run" . | fromYaml -}}
{{- $values := .Values -}}{{- $storage := .Values.storage -}}{{- $redis := .Values.redis -}}
{{- $ranks := int $run.training.num_ranks -}}
{{- $learners := int .Values.learner.replicas -}}
{{- $mode := .Values.autoscaling.mode -}}

{{- if not $run.model.path }}
run.model.path is empty: name a directory in the images or on a volume (extraVolumes), or a hub
  name.
{{- end }}
{{- if not (regexMatch "^[a-z0-9][a-z0-9-]{0,62}$" $run.name) }}
run.name {{ $run.name }}, or the release's name, is not lower case letters, digits and dashes: set
  run.name.
{{- end }}
{{- if not (regexMatch "^[a-z]" (include "sdar.fullname" .)) }}
The release's name {{ .Release.Name }} begins with a digit, and a Service's may not: choose another,
  or set fullnameOverride.
{{- end }}

{{- /* GPUs */}}
{{- range $role := list "rollout" "teacher" }}
{{- $gpus := int (index $values $role "gpus") }}
{{- $parallel := int (index $run $role "tensor_parallel_size") }}
{{- if and (gt $gpus 0) (ne $gpus $parallel) }}
{{ $role }}.gpus is {{ $gpus }}, but one engine spans run.{{ $role }}.tensor_parallel_size
  {{ $parallel }}. Make them equal, or set {{ $role }}.gpus to 0 for a CPU.
{{- end }}
{{- if and (eq $gpus 0) (gt $parallel 1) }}
run.{{ $role }}.tensor_parallel_size is {{ $parallel }}, but {{ $role }}.gpus is 0. Set
  {{ $role }}.gpus to {{ $parallel }}.
{{- end }}
{{- end }}
{{- $gpus := int .Values.learner.gpus }}
{{- $ranksPerPod := include "sdar.ranksPerPod" . | int }}
{{- if ne (mod $ranks $learners) 0 }}
learner.replicas {{ $learners }} does not divide run.training.num_ranks {{ $ranks }}. Each pod has
  the same number of ranks.
{{- else if and (gt $gpus 0) (ne $gpus $ranksPerPod) }}
learner.gpus is {{ $gpus }}, but each of learner.replicas {{ $learners }} pods has
  {{ $ranksPerPod }} of run.training.num_ranks {{ $ranks }}, and a rank takes one GPU. Set
  learner.gpus to {{ $ranksPerPod }}.
{{- end }}

{{- /* Volumes */}}
{{- $isForSeveral := or $storage.existingClaim (has "ReadWriteMany" $storage.accessModes) }}
{{- if and (gt $learners 1) (not $isForSeveral) }}
learner.replicas is {{ $learners }}, and all its pods write checkpoints, but storage.accessModes has
  no ReadWriteMany. Add it, with a storage.storageClass that can, or name a storage.existingClaim.
{{- end }}
{{- if and (not $storage.weightsUrl) (has "ReadWriteOncePod" $storage.accessModes) }}
storage.accessModes has ReadWriteOncePod, but rollouts and teachers read weights from the learner's
  claim. Use ReadWriteOnce or ReadWriteMany, or put the weights in a bucket by storage.weightsUrl.
{{- end }}

{{- /* Sizes */}}
{{- range $role := list "rollout" "teacher" "envs" }}
{{- $replicas := index $values $role "replicas" }}
{{- if gt (int $replicas.min) (int $replicas.max) }}
{{ $role }}.replicas.min {{ int $replicas.min }} is above {{ $role }}.replicas.max
  {{ int $replicas.max }}. Lower the first or raise the second.
{{- end }}
{{- end }}
{{- if and .Values.autoscaling.dryRun (ne $mode "gateway") }}
autoscaling.dryRun is about the gateway, and autoscaling.mode is {{ $mode }}. Set the mode to
  gateway.
{{- end }}
{{- if and (eq $mode "keda") (not (.Capabilities.APIVersions.Has "keda.sh/v1alpha1")) }}
autoscaling.mode is keda, and this cluster does not serve keda.sh/v1alpha1. Install KEDA, or set the
  mode to gateway.
{{- end }}

{{- /* Addresses */}}
{{- if and $redis.enabled $redis.url }}
redis.url names a Redis, and redis.enabled starts another. Set redis.enabled to false.
{{- end }}
{{- if not (or $redis.enabled $redis.url $redis.existingSecret) }}
redis.enabled is false: name a Redis by redis.url, or a Secret that does by redis.existingSecret.
{{- end }}
{{- if and (eq $mode "keda") (contains "%" (get (urlParse $redis.url) "userinfo")) }}
redis.url has a user or password with %, which KEDA would take as it stands. Name a Secret by
  redis.existingSecret.
{{- end }}
{{- if and $redis.url $redis.existingSecret }}
redis.url and redis.existingSecret both name a Redis. Leave one out.
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
ingress.host is empty. Name the host that the gateway is called by.
{{- end }}
{{- end }}
