"""What people see of a run: progress, TensorBoard, and the pages with their charts."""
