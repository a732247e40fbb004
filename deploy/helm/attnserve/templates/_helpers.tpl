{{- define "attnserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "attnserve" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-attnserve" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "attnserve.selector" -}}
app.kubernetes.io/name: attnserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "attnserve.labels" -}}
{{ include "attnserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "attnserve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "attnserve.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "attnserve.fullname" .) -}}
{{- end -}}

{{- define "attnserve.scheme" -}}
{{- if .Values.tls.secret -}}HTTPS{{- else -}}HTTP{{- end -}}
{{- end -}}

{{- define "attnserve.provider" -}}
{{- if gt (int .Values.gpu.count) 0 -}}{{ .Values.gpu.provider }}{{- else -}}CPUExecutionProvider{{- end -}}
{{- end -}}

{{/* The fewest replicas that there are. */}}
{{- define "attnserve.leastReplicas" -}}
{{- if eq .Values.autoscaling.kind "none" -}}{{ int .Values.replicas }}{{- else -}}{{ int .Values.autoscaling.minReplicas }}{{- end -}}
{{- end -}}

{{/* The least grace period: endpoints are updated, requests drain, and the process has ended two seconds later. */}}
{{- define "attnserve.leastGraceS" -}}
{{- add (int .Values.preStopS) (int (ceil .Values.drainGraceS)) 2 -}}
{{- end -}}

{{- define "attnserve.graceS" -}}
{{- if .Values.gracePeriodS -}}{{ int .Values.gracePeriodS }}{{- else -}}{{ include "attnserve.leastGraceS" . }}{{- end -}}
{{- end -}}

{{/* A value as the server reads it. Helm holds numbers as floats, and prints large ones with an exponent. */}}
{{- define "attnserve.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* Bytes of a Kubernetes quantity, in MiB rounded down. */}}
{{- define "attnserve.mib" -}}
{{- $text := toString . -}}
{{- $digits := regexFind "^[0-9]+([.][0-9]+)?" $text -}}
{{- $unit := trimPrefix $digits $text -}}
{{- $bytes := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if or (not $digits) (not (hasKey $bytes $unit)) -}}
{{- fail (printf "resources.limits.memory is %s: give it in Mi or Gi" $text) -}}
{{- end -}}
{{- divf (mulf (float64 $digits) (get $bytes $unit)) 1048576 | floor | int64 -}}
{{- end -}}

{{/* The most memory in MiB that callers can make a pod take: the formula of docs/how-to/bound-callers.md. */}}
{{- define "attnserve.peakMib" -}}
{{- $s := .Values.settings -}}
{{- $m := .Values.models -}}
{{- $count := int64 $m.count -}}
{{- $weights := mul 2 (int64 $m.filesMiB) -}}
{{- $runs := mul $count (int64 $s.instances) (max (int64 $m.sequenceMiB) (ceil (divf $s.max_batch_bytes 1048576) | int64)) -}}
{{- $queues := mul $count (ceil (divf (mulf $s.max_queue_bytes 1.125) 1048576) | int64) -}}
{{- $unread := ceil (divf $s.max_unread_bytes 1048576) | int64 -}}
{{- $received := ceil (divf $s.receive_budget_bytes 1048576) | int64 -}}
{{- $processes := 192 -}}
{{- if eq $s.isolation "process" -}}
{{- $fronts := int64 $s.fronts -}}
{{- $processes = add (mul (add $fronts 1) 96) (mul $count 192) (mul $fronts $count 128) -}}
{{- end -}}
{{- $scratch := 0 -}}
{{- if .Values.scratch.inMemory -}}{{- $scratch = int64 .Values.scratch.sizeMiB -}}{{- end -}}
{{- add $weights $runs $queues $unread $received $processes $scratch -}}
{{- end -}}

{{/* Refuse values that contradict each other. The schema refuses those that are wrong by themselves. */}}
{{- define "attnserve.check" -}}
{{- $v := .Values -}}
{{- $places := 0 -}}
{{- range list $v.models.claim $v.models.image $v.models.hostPath $v.models.inImage -}}
{{- if . -}}{{- $places = add $places 1 -}}{{- end -}}
{{- end -}}
{{- if ne (int $places) 1 -}}
{{- fail (printf "models: %d of claim, image, hostPath and inImage are set; set exactly one" (int $places)) -}}
{{- end -}}
{{- if and (not $v.insecure) (not $v.tls.secret) -}}
{{- fail "tls.secret is empty: name a secret of type kubernetes.io/tls, or set insecure: true to serve without TLS" -}}
{{- end -}}
{{- if and (not $v.insecure) (not $v.tokens.secret) (not $v.tls.clientCaSecret) -}}
{{- fail "tokens.secret and tls.clientCaSecret are empty: set one of them, or insecure: true to serve every caller" -}}
{{- end -}}
{{- if and $v.tls.clientCaSecret (not $v.tls.secret) -}}
{{- fail "tls.clientCaSecret is set and tls.secret is not: client certificates need TLS" -}}
{{- end -}}
{{- $peak := include "attnserve.peakMib" . | int -}}
{{- $limit := include "attnserve.mib" $v.resources.limits.memory | int -}}
{{- if lt $limit $peak -}}
{{- fail (printf "resources.limits.memory is %d MiB, below the %d MiB that callers can make a pod take: raise it, or lower settings.instances, max_batch_bytes, max_queue_bytes, max_unread_bytes or receive_budget_bytes (docs/how-to/bound-callers.md)" $limit $peak) -}}
{{- end -}}
{{- $bytes := mul 3 (int $v.models.filesMiB) | int -}}
{{- if lt (int $v.scratch.sizeMiB) $bytes -}}
{{- fail (printf "scratch.sizeMiB is %d, below three times models.filesMiB, %d" (int $v.scratch.sizeMiB) $bytes) -}}
{{- end -}}
{{- $graceS := include "attnserve.leastGraceS" . | int -}}
{{- if lt (include "attnserve.graceS" . | int) $graceS -}}
{{- fail (printf "gracePeriodS is %d, below the %d s of preStopS, drainGraceS and the end of the process: requests would be lost; raise it, or lower drainGraceS" (int $v.gracePeriodS) $graceS) -}}
{{- end -}}
{{- $least := include "attnserve.leastReplicas" . | int -}}
{{- if and $v.podDisruptionBudget.enabled (ge (int $v.podDisruptionBudget.maxUnavailable) $least) (gt $least 1) -}}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %d of %d replicas: a drained node may end all of them; lower it, or set more replicas" (int $v.podDisruptionBudget.maxUnavailable) $least) -}}
{{- end -}}
{{- if and (ne $v.autoscaling.kind "none") (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas is %d, above maxReplicas, %d" (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (ne $v.autoscaling.kind "none") (gt (int $v.autoscaling.cpuPercent) 0) (not (dig "requests" "cpu" "" $v.resources)) -}}
{{- fail "autoscaling.cpuPercent is a share of resources.requests.cpu, which is empty: set it, or cpuPercent: 0" -}}
{{- end -}}
{{- if and (or $v.settings.admin $v.settings.watch_repository) (ne $v.settings.isolation "none") -}}
{{- fail "settings.admin and settings.watch_repository need settings.isolation: none" -}}
{{- end -}}
{{- if and $v.serviceMonitor.enabled $v.tokens.secret (not $v.serviceMonitor.tokenSecret) -}}
{{- fail "serviceMonitor.tokenSecret is empty: /metrics needs a token of the scope metrics where tokens.secret is set" -}}
{{- end -}}
{{- if and $v.serviceMonitor.enabled $v.tls.secret (not $v.serviceMonitor.caSecret) -}}
{{- fail "serviceMonitor.caSecret is empty: Prometheus needs the authority of the server's certificate where tls.secret is set" -}}
{{- end -}}
{{- if and $v.serviceMonitor.enabled $v.tls.clientCaSecret (not $v.serviceMonitor.clientSecret) -}}
{{- fail "serviceMonitor.clientSecret is empty: /metrics needs a client certificate where tls.clientCaSecret is set" -}}
{{- end -}}
{{- end -}}

{{- define "attnserve.probe" -}}
{{- if and (eq .root.Values.probes.kind "exec") .root.Values.tls.secret -}}
exec:
  command: [python, -c, "import ssl, urllib.request as u; u.urlopen('https://127.0.0.1:8002{{ .path }}', timeout=2, context=ssl._create_unverified_context())"]
{{- else if eq .root.Values.probes.kind "exec" -}}
exec:
  command: [python, -c, "import urllib.request as u; u.urlopen('http://127.0.0.1:8002{{ .path }}', timeout=2)"]
{{- else -}}
httpGet: {path: {{ .path }}, port: http, scheme: {{ include "attnserve.scheme" .root }}}
{{- end -}}
{{- end -}}

{{- define "attnserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "attnserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
