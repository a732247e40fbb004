"""Render the Helm chart without Helm, and write the manifests of deploy/kustomize from it.

python deploy/render.py                               write deploy/kustomize/base and monitoring
python deploy/render.py --check                       list those that are out of date; exit code 1 if there is one
python deploy/render.py --values FILE [--only KIND]   print the manifests of these values

Needs the package helm-python-sdk. Values that the chart refuses are one sentence on standard error, and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart
from helm_python.errors import HelmRenderError, HelmValuesError

FOLDER = Path(__file__).parent
CHART = FOLDER / "helm/attnserve"
KUSTOMIZE = FOLDER / "kustomize"
NOTE = "# Written by deploy/render.py from the chart and values.yaml: change those, then run it again.\n"
MONITORING = ("ServiceMonitor", "PrometheusRule")
_OF_HELM = re.compile(r"^ *(app\.kubernetes\.io/managed-by|helm\.sh/chart): .*\n", re.MULTILINE)


class Refused(ValueError):
    """The chart refuses the values; the message is that of the schema, or of the template that compares them."""


def rendered(values: dict[str, Any], name: str = "attnserve", namespace: str = "default") -> dict[str, str]:
    """Return the manifests of these values, by template; empty ones are left out.

    Raises:
        Refused: the schema or a template refuses the values.
    """
    with Chart.load(CHART) as chart:
        try:
            chart.validate_schema(values)
            texts = chart.render(values, name=name, namespace=namespace)
        except (HelmRenderError, HelmValuesError) as error:
            raise Refused(re.sub(r"^.*execution error at \([^)]*\): ", "", str(error), flags=re.DOTALL)) from None
    return {place: text for place, text in texts.items() if text.strip()}


def documents(texts: dict[str, str]) -> list[str]:
    """Return each object's text, in the order of the templates, without the notes."""
    manifests = [text for place, text in sorted(texts.items()) if place.endswith(".yaml")]
    parts = [part for text in manifests for part in re.split(r"^---\n", text, flags=re.MULTILINE)]
    return [f"{part.strip()}\n" for part in parts if yaml.safe_load(part) is not None]


def kustomized() -> dict[Path, str]:
    """Return the manifests of deploy/kustomize by path: without labels of Helm, and without the pods of `helm test`."""
    values = yaml.safe_load((KUSTOMIZE / "values.yaml").read_text(encoding="utf-8"))
    base, monitoring = [], []
    for text in documents(rendered(values)):
        kind = yaml.safe_load(text)["kind"]
        if kind != "Pod":
            (monitoring if kind in MONITORING else base).append(_OF_HELM.sub("", text))
    return {
        KUSTOMIZE / "base/attnserve.yaml": NOTE + "---\n".join(base),
        KUSTOMIZE / "monitoring/monitoring.yaml": NOTE + "---\n".join(monitoring),
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Render the Helm chart, or write the manifests of deploy/kustomize.")
    parser.add_argument("--check", action="store_true", help="list manifests that are out of date, and write nothing")
    parser.add_argument("--values", type=Path, help="print the manifests of this file of values")
    parser.add_argument("--only", help="print objects of this kind only, such as Deployment")
    options = parser.parse_args()
    if options.values:
        values = yaml.safe_load(options.values.read_text(encoding="utf-8")) or {}
        try:
            texts = documents(rendered(values))
        except Refused as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print("---\n".join(text for text in texts if options.only in (None, yaml.safe_load(text)["kind"])), end="")
        return 0
    stale = []
    for path, text in kustomized().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(FOLDER).as_posix())
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}; run `python deploy/render.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
