"""Reading DICOM: series, pixel data, SEG, RTSTRUCT and masks that other files hold."""
