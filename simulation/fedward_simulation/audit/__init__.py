"""What a study's model and updates remember of its patients, measured by attacking them."""
