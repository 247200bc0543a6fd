# A hospital's configuration and key, once; its public key goes to the aggregator.
set -eu
name=$1
if [ ! -e /var/lib/fedward/connector/site.key ]; then
  cp /handover/aggregator-ca.pem /etc/fedward/aggregator-ca.pem
  sed -e "s/@NAME@/$name/" -e "s/@COORDINATOR@/$(cat /handover/coordinator)/" \
    /federation/site.toml > /etc/fedward/site.toml
  fedward-client enrol
fi
cp /var/lib/fedward/connector/site.pub "/handover/$name.pub"
