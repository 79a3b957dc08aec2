"""Fine-tuning: a person's file -> conversations -> ids and what is learned of them; adapters, objectives, and what they did."""
