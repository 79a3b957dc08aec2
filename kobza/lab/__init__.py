"""The lab: a design (one base, factors with levels, seeds, a budget) -> paired runs -> statistics -> a report in words."""
