{{/*
The rules between sections of the run: rows of files/rules.yaml, which RunConfig judges too.
sdar/contracts/rules.py says what a row means. Gives the sentence of each that is broken, one a
line, in which keys are as a values file has them.
*/}}
{{- define "sdar.brokenRules" -}}
{{- $run := include "sdar.run" . | fromYaml -}}
{{- range .Files.Get "files/rules.yaml" | fromYamlArray }}
{{- $one := include "sdar.readRun" (list $run .key) | fromJson }}
{{- $other := include "sdar.readRun" (list $run .other) | fromJson }}
{{- $holds := true }}
{{- if eq .relation "at most" }}
{{- $holds = le (float64 $one.value) (float64 $other.value) }}
{{- else if eq .relation "below" }}
{{- $holds = lt (float64 $one.value) (float64 $other.value) }}
{{- else if eq $one.value .value }}
{{- $holds = has $other.value .values | eq (eq .relation "requires") }}
{{- end }}
{{- if not $holds }}
{{ .sentence | replace $one.placeholder $one.text | replace $other.placeholder $other.text }}
{{- end }}
{{- end }}
{{- end }}

{{/*
A dotted key of the run: its `value`, and what a sentence's `placeholder` for it is replaced by, the
`text`. Takes (list RUN "section.key").
*/}}
{{- define "sdar.readRun" -}}
{{- $key := index . 1 -}}{{- $value := index . 0 -}}
{{- range splitList "." $key -}}{{- $value = index $value . -}}{{- end -}}
{{- $text := printf "run.%s %s" $key (toJson $value | trimAll "\"") -}}
{{- dict "value" $value "text" $text "placeholder" (printf "{%s}" $key) | toJson -}}
{{- end }}
