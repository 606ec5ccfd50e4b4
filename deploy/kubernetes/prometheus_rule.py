"""Writes components/monitoring/prometheusrule.yaml from deploy/prometheus/rules: `make prometheus-rule`.

The Prometheus operator takes rules as an object of its own. Kustomize cannot put a file into one, so
the object is kept beside the rules that it repeats, and a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

RULES: Final = Path(__file__).parents[1] / "prometheus" / "rules"
FILE: Final = Path(__file__).parent / "components" / "monitoring" / "prometheusrule.yaml"
HEAD: Final = """\
# Written by `make prometheus-rule` from deploy/prometheus/rules: change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ambidex
  labels:
    app.kubernetes.io/name: ambidex
spec:
  groups:
"""


def prometheus_rule(rules: Path = RULES) -> str:
    """The object's YAML: the groups of every file, comments included, two columns further in."""
    text = HEAD
    for file in sorted(rules.glob("*.yml")):
        _, _, groups = file.read_text(encoding="utf-8").partition("\ngroups:\n")
        text += "".join(f"  {line}".rstrip() + "\n" for line in groups.splitlines())
    return text


if __name__ == "__main__":
    FILE.write_text(prometheus_rule(), encoding="utf-8")
