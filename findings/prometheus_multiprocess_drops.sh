#!/usr/bin/env bash
# In its mode for several processes, prometheus_client drops Info, Enum and exemplars, and calls no gauge's function.
#
# Versions: prometheus_client 0.26.0.
# Source: https://prometheus.github.io/client_python/multiprocess/ (its list of limitations).
# Expected by most: a metric that cannot be exported raises where it is made, or logs. The same program with
# PROMETHEUS_MULTIPROC_DIR set exports the same names.
# Observed: all are made and set without an error or a warning. The scrape has no Info and no Enum, the histogram has no
# exemplar, and a gauge with set_function is exported as 0 and its function is never called. An alert on "queue depth
# above 100" by such a gauge never fires.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check prometheus_client==0.26.0
cd "$work"
cat > program.py <<'PROGRAM'
import os
import sys
import warnings

warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)  # about its open files, at exit
from prometheus_client import REGISTRY, CollectorRegistry, Enum, Gauge, Histogram, Info, multiprocess
from prometheus_client.openmetrics.exposition import generate_latest

calls = []
Info("build", "Version.").info({"version": "1"})
Enum("phase", "Phase.", states=["starting", "ready"]).state("ready")
Gauge("depth", "Depth of the queue.").set_function(lambda: calls.append(1) or 250)
Histogram("latency", "Latency.", buckets=(1, 10)).observe(0.5, exemplar={"trace": "abc"})
registry = REGISTRY
if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
text = generate_latest(registry).decode()
lines = [line for line in text.splitlines() if not line.startswith("#")]
print("info:", any(line.startswith("build_info") for line in lines))
print("enum:", any(line.startswith("phase") for line in lines))
print("exemplar:", 'trace="abc"' in text)
print("gauge:", [line.split()[-1] for line in lines if line.startswith("depth")], "calls of its function:", len(calls))
PROGRAM
alone=$("$work/venv/bin/python" program.py 2>&1)
mkdir "$work/metrics"
several=$(PROMETHEUS_MULTIPROC_DIR="$work/metrics" "$work/venv/bin/python" program.py 2>&1)
echo "one process:"
echo "$alone"
echo "several processes:"
echo "$several"
expected_alone=$'info: True\nenum: True\nexemplar: True\ngauge: [\'250.0\'] calls of its function: 1'
[ "$alone" = "$expected_alone" ] || { echo "the control failed" >&2; exit 1; }
[ "$several" != "$alone" ] || { echo "both are equal: the behaviour is no longer there" >&2; exit 1; }
expected_several=$'info: False\nenum: False\nexemplar: False\ngauge: [\'0.0\'] calls of its function: 0'
[ "$several" = "$expected_several" ] || { echo "another difference than the one that is described" >&2; exit 1; }
