"""The contest: who trains the best small model here and now? Submissions, their proof, blind votes, bracket and standings."""
