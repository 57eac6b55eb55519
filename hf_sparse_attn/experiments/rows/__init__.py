"""What single tasks read: classes, series, planted passages, parts of texts before and after a cut."""
