# The aggregator's folder, once; then what hospitals must know: its authority and its key.
set -eu
folder=/var/lib/fedward-server/aggregator
[ -e "$folder" ] || fedward-server init "$folder" --host aggregator > /dev/null
cp "$folder/tls/ca.crt" /handover/aggregator-ca.pem
python - "$folder/keys/coordinator.key" > /handover/coordinator <<'PYTHON'
import sys
from pathlib import Path
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fedward.signing import fingerprint, public_bytes
print(fingerprint(public_bytes(load_pem_private_key(Path(sys.argv[1]).read_bytes(), None))))
PYTHON
echo "The aggregator is there; its coordinator is $(cat /handover/coordinator)."
