# What the hospital's study may use.
set -eu
fedward-client data freeze images
