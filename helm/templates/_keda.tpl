{{/*
KEDA in place of the gateway's autoscaler. Two triggers a role, of which the larger counts: entries
that wait, and entries in hand, so that a role that is busy with the last ones is not taken for
idle. Without work there are no pods but environments, which the gateway asks for tasks first.
Takes (dict "root" $ "role" "rollout" "stream" "tasks" "group" "rollout" "perPod" 16).
*/}}
{{- define "sdar.scaledObject" -}}
{{- $root := .root -}}{{- $run := include "sdar.runName" $root -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {{- include "sdar.metadata" (list $root .role) | nindent 2 }}
spec:
  scaleTargetRef:
    kind: Deployment
    name: {{ include "sdar.name" (list $root .role) }}
  minReplicaCount: {{ eq .role "envs" | ternary (index $root.Values .role).replicas.min 0 }}
  maxReplicaCount: {{ (index $root.Values .role).replicas.max }}
  cooldownPeriod: 300
  triggers:
    {{- range list "lag" "pending" }}
    - type: redis-streams
      metadata:
        stream: sdar:{{ $run }}:stream:{{ $.stream }}
        consumerGroup: {{ $.group }}
        {{- if eq . "lag" }}
        lagCount: {{ $.perPod | quote }}
        activationLagCount: "0"
        {{- else }}
        pendingEntriesCount: {{ $.perPod | quote }}
        {{- end }}
        {{- with regexFind "[0-9]+$" (get (urlParse $root.Values.redis.url) "path") }}
        databaseIndex: {{ . | quote }}
        {{- end }}
        {{- if hasPrefix "rediss:" $root.Values.redis.url }}
        enableTLS: "true"
        {{- end }}
      authenticationRef:
        name: {{ include "sdar.name" (list $root "redis") }}
    {{- end }}
{{- end }}

{{/* Whether KEDA sets a role's size: one that has a stream to go by. Takes (list $ "role"). */}}
{{- define "sdar.isKedaScaled" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- if eq $root.Values.autoscaling.mode "keda" -}}
{{- if eq $role "rollout" }}true
{{- else if eq $role "envs" }}{{ include "sdar.hasEnvs" $root }}
{{- else if eq $role "teacher" }}{{ include "sdar.isScoring" $root }}
{{- end -}}
{{- end -}}
{{- end }}
