"""What a finished study hands over."""
