"""The kinds of task: for each its targets, losses, metrics and additive counts in one file.

A mean of the sites' AUCs is not the AUC of all patients. Sites therefore send counts; their sum
gives the figures of the pooled images. A site may withhold a part, which then holds nothing; a
figure is that of the sites that let its part go.
"""
