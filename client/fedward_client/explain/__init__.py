"""Why a finished study's model answered as it did, for the people at the hospital."""
