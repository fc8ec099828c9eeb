{{/*
What values.schema.json cannot say, because it is about several values at once. Each sentence names the keys and what to do.
*/}}
{{- define "sdar.validate" -}}
{{- $run := include "sdar.run" . | fromYaml -}}
{{- $training := $run.training -}}
{{- $ranks := int $training.num_ranks -}}
{{- $learners := int .Values.learner.replicas -}}
{{- $problems := list -}}

{{- if not $run.model.path -}}
{{- $problems = append $problems "run.model.path is empty: name a directory in the images or on a volume (extraVolumes), or a hub name." -}}
{{- end -}}
{{- if not (regexMatch "^[a-z0-9][a-z0-9-]{0,62}$" $run.name) -}}
{{- $problems = append $problems (printf "run.name %s, or the release's name, is not lower case letters, digits and dashes: set run.name." $run.name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" (include "sdar.fullname" .)) -}}
{{- $problems = append $problems (printf "The release's name %s begins with a digit, and a Service's may not: choose another, or set fullnameOverride." .Release.Name) -}}
{{- end -}}

{{/* The same rules between sections that RunConfig has; a test compares them. */}}
{{- if lt (int $run.rollout.max_concurrent_episodes) (int $training.group_size) -}}
{{- $problems = append $problems (printf "run.rollout.max_concurrent_episodes %v is below run.training.group_size %v: a group would never fit. Raise the first or lower the second." $run.rollout.max_concurrent_episodes $training.group_size) -}}
{{- end -}}
{{- if ge (int $run.rollout.max_response_tokens) (int $run.model.max_sequence_tokens) -}}
{{- $problems = append $problems (printf "run.rollout.max_response_tokens %v leaves no room for a prompt within run.model.max_sequence_tokens %v. Lower the first or raise the second." $run.rollout.max_response_tokens $run.model.max_sequence_tokens) -}}
{{- end -}}
{{- if gt (int $training.num_minibatches) (int $training.groups_per_update) -}}
{{- $problems = append $problems (printf "run.training.num_minibatches %v exceeds run.training.groups_per_update %v. Lower it." $training.num_minibatches $training.groups_per_update) -}}
{{- end -}}
{{- if and (eq $run.teacher.retrieval "ucb") (eq $run.method.name "skill_grpo") -}}
{{- $problems = append $problems "run.teacher.retrieval ucb learns from episodes that pass the teacher, and run.method.name skill_grpo sends it none. Use another retrieval or another method." -}}
{{- end -}}
{{- if and (eq $run.teacher.scorer "vllm") (ne (float64 $run.rollout.temperature) 1.0) -}}
{{- $problems = append $problems (printf "run.teacher.scorer vllm scores at temperature 1 only, run.rollout.temperature is %v. Use the transformers scorer, or temperature 1." $run.rollout.temperature) -}}
{{- end -}}
{{- if and (eq $run.teacher.scorer "transformers") (gt (int $run.teacher.tensor_parallel_size) 1) -}}
{{- $problems = append $problems (printf "run.teacher.tensor_parallel_size %v needs run.teacher.scorer vllm; the transformers scorer uses one GPU. Change one of them." $run.teacher.tensor_parallel_size) -}}
{{- end -}}

{{/* GPUs */}}
{{- range $role := list "rollout" "teacher" -}}
{{- $gpus := int (index $.Values $role "gpus") -}}{{- $parallel := int (index $run $role "tensor_parallel_size") -}}
{{- if and (gt $gpus 0) (ne $gpus $parallel) -}}
{{- $problems = append $problems (printf "%s.gpus is %d, but one engine spans run.%s.tensor_parallel_size %d. Make them equal, or set %s.gpus to 0 for a CPU." $role $gpus $role $parallel $role) -}}
{{- end -}}
{{- if and (eq $gpus 0) (gt $parallel 1) -}}
{{- $problems = append $problems (printf "run.%s.tensor_parallel_size is %d, but %s.gpus is 0. Set %s.gpus to %d." $role $parallel $role $role $parallel) -}}
{{- end -}}
{{- end -}}
{{- if ne (mod $ranks $learners) 0 -}}
{{- $problems = append $problems (printf "learner.replicas %d does not divide run.training.num_ranks %d. Each pod has the same number of ranks." $learners $ranks) -}}
{{- else if and (gt (int .Values.learner.gpus) 0) (ne (int .Values.learner.gpus) (div $ranks $learners | int)) -}}
{{- $problems = append $problems (printf "learner.gpus is %d, but each of learner.replicas %d pods has %d of run.training.num_ranks %d, and a rank takes one GPU. Set learner.gpus to %d." (int .Values.learner.gpus) $learners (div $ranks $learners | int) $ranks (div $ranks $learners | int)) -}}
{{- end -}}
{{- if and (gt $learners 1) (not .Values.storage.existingClaim) (not (has "ReadWriteMany" .Values.storage.accessModes)) -}}
{{- $problems = append $problems (printf "learner.replicas is %d, and all its pods write checkpoints, but storage.accessModes has no ReadWriteMany. Add it, with a storage.storageClass that can, or name a storage.existingClaim." $learners) -}}
{{- end -}}

{{- if and (not .Values.storage.weightsUrl) (has "ReadWriteOncePod" .Values.storage.accessModes) -}}
{{- $problems = append $problems "storage.accessModes has ReadWriteOncePod, but rollouts and teachers read weights from the learner's claim. Use ReadWriteOnce or ReadWriteMany, or put the weights in a bucket by storage.weightsUrl." -}}
{{- end -}}

{{/* Sizes */}}
{{- range $role := list "rollout" "teacher" "envs" -}}
{{- $replicas := index $.Values $role "replicas" -}}
{{- if gt (int $replicas.min) (int $replicas.max) -}}
{{- $problems = append $problems (printf "%s.replicas.min %d is above %s.replicas.max %d. Lower the first or raise the second." $role (int $replicas.min) $role (int $replicas.max)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.dryRun (ne .Values.autoscaling.mode "gateway") -}}
{{- $problems = append $problems (printf "autoscaling.dryRun is about the gateway, and autoscaling.mode is %s. Set the mode to gateway." .Values.autoscaling.mode) -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.mode "keda") (not (.Capabilities.APIVersions.Has "keda.sh/v1alpha1")) -}}
{{- $problems = append $problems "autoscaling.mode is keda, and this cluster does not serve keda.sh/v1alpha1. Install KEDA, or set the mode to gateway." -}}
{{- end -}}

{{/* Places */}}
{{- if and .Values.redis.enabled .Values.redis.url -}}
{{- $problems = append $problems "redis.url names a Redis, and redis.enabled starts another. Set redis.enabled to false." -}}
{{- end -}}
{{- if not (or .Values.redis.enabled .Values.redis.url .Values.redis.existingSecret) -}}
{{- $problems = append $problems "redis.enabled is false: name a Redis by redis.url, or a Secret that does by redis.existingSecret." -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.mode "keda") (contains "%" (get (urlParse .Values.redis.url) "userinfo")) -}}
{{- $problems = append $problems "redis.url has a user or password with %, which KEDA would take as it stands. Name a Secret by redis.existingSecret." -}}
{{- end -}}
{{- if and .Values.redis.url .Values.redis.existingSecret -}}
{{- $problems = append $problems "redis.url and redis.existingSecret both name a Redis. Leave one out." -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- $problems = append $problems "ingress.host is empty. Name the host that the gateway is called by." -}}
{{- end -}}

{{- if $problems -}}
{{- fail (printf "\n\n  %s\n" (join "\n  " $problems)) -}}
{{- end -}}
{{- end }}
