"""What goes into an exported bundle as it stands; imports nothing of Fedward."""
