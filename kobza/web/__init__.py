"""What our live pages and servers share: who is let in, how a server runs, and the look of a page."""
