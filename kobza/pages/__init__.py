"""What our HTML pages and their pictures share: one shell, one style, files that are whole or untouched."""
