# One study, once; a later start shows how it ended.
set -eu
study=$(fedward-server study list --json | python -c '
import json, sys
print(next((one["id"] for one in json.load(sys.stdin)["studies"]), ""))')
if [ -z "$study" ]; then
  study=$(fedward-server study submit /federation/study.toml --sites north,south --json | python -c '
import json, sys
print(json.load(sys.stdin)["id"])')
fi
fedward-server study watch "$study"
fedward-server study report "$study" --out /results/report.html
fedward-server study model "$study" --out /results/model.safetensors
