"""Rewards: one door (`RewardSource`), and what stands behind it."""
