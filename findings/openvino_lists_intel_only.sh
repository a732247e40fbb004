#!/usr/bin/env bash
# The OpenVINO plug-in registers on an AMD processor without an error, and offers no device, though OpenVINO runs there.
#
# Versions: onnxruntime 1.32.0 (CPU), onnxruntime-ep-openvino 1.8.1; a processor that is not Intel's, on x86-64.
# Source: https://pypi.org/project/onnxruntime-ep-openvino/ ("No Devices Found: verify your hardware is supported");
# OpenVINO's own list of processors has other vendors; https://github.com/microsoft/onnxruntime/pull/31981 (the same
# check in the provider that is built into the runtime).
# Expected by most: a library that registers offers its device, or the registration fails.
# Observed: the list of devices has the CPU provider's alone. `get_available_providers` never lists a plug-in, so the
# list of devices is the only place that shows it.
set -euo pipefail
if grep -q GenuineIntel /proc/cpuinfo; then
    echo "skipped: this processor is Intel's"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnxruntime==1.32.0 \
    onnxruntime-ep-openvino==1.8.1
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import onnxruntime as ort
import onnxruntime_ep_openvino as plugin

before = {device.ep_name for device in ort.get_ep_devices()}
ort.register_execution_provider_library("openvino", plugin.get_library_path())
devices = [(device.ep_name, device.device.type.name, device.device.vendor) for device in ort.get_ep_devices()]
print("devices:", devices)
print("available providers:", ort.get_available_providers())
assert before == {"CPUExecutionProvider"}, "the control: the runtime lists its own device"
if any(name == plugin.get_ep_name() for name, _, _ in devices):
    raise SystemExit("the plug-in offers this processor: the behaviour is no longer there")
try:
    ort.register_execution_provider_library("openvino", plugin.get_library_path())
except Exception as error:
    print("the library was registered:", str(error).splitlines()[0][:120])
else:
    raise SystemExit("the library was not registered, so the first call did nothing")
PYTHON
