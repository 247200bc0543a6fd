# Two SYNTHETIC hospitals, once.
set -eu
[ ! -e /images/south/README.txt ] || exit 0
fedward-simulate cohort /tmp/cohort --hospitals 2 --patients "${PATIENTS:-60}"
cp -R /tmp/cohort/hospital-1/. /images/north
cp -R /tmp/cohort/hospital-2/images /tmp/cohort/hospital-2/labels.csv /images/south
cp /tmp/cohort/hospital-2/README.txt /images/south
