"""What both sides of a study must agree on."""

from fedward.lean import prepare

prepare()
