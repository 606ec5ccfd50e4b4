"""The engines that serve: one takes the place of another that has failed, or has older weights."""
