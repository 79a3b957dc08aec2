"""The report room: what a training run left behind -> landmarks, a coach's remarks, a picture and one HTML page."""
