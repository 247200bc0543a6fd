"""What both sides of a study must agree on."""

from fedward.startup import prepare

prepare()
