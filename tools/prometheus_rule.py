"""Alert rules for the Prometheus operator: wrap a rule file of Prometheus into a PrometheusRule.

python tools/prometheus_rule.py moe_dist/monitor/alerts.yml > k8s/components/monitoring/prometheusrule.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

HEAD = """\
# Made by tools/prometheus_rule.py from {path}: change the rules there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: moe-dist
  labels: {{app.kubernetes.io/name: moe-dist}} # and whatever your Prometheus selects by, such as release: prometheus
spec:
"""


def prometheus_rule(path: Path, name: str) -> str:
    """The object as YAML, the rules word for word as they are. Raises ValueError when there are none."""
    text = path.read_text("utf-8")
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict) or set(tree) != {"groups"} or not tree["groups"]:
        raise ValueError(f"{path}: not a rule file: it must hold `groups` and nothing else")
    lines = text[text.index("groups:") :].splitlines()
    return HEAD.format(path=name) + "\n".join(f"  {line}".rstrip() for line in lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/prometheus_rule.py RULES > OBJECT")
    try:
        print(prometheus_rule(Path(sys.argv[1]), sys.argv[1]), end="")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
