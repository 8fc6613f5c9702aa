"""Tables of matches for tests, laid out from lists of pairs one by one."""

import torch

from patch_matching import Matches


def lay_out(pairs, position):
    """Return (Matches, places) of pairs in any order.

    Args:
        pairs: list of (image, row of the teacher's output, row of the student's output, num_matched).
        position: of each row of the teacher's output, a list.

    Returns:
        places: of each pair its (m, student token) in the table.
    """
    images = range(1 + max(image for image, *_ in pairs))
    teachers = sorted({(image, teacher) for image, teacher, _, _ in pairs})
    matches_of = {}  # (image, row of the student's output): numbers of the pairs
    for number, (image, _, student, _) in enumerate(pairs):
        matches_of.setdefault((image, student), []).append(number)
    students = sorted(matches_of)
    teacher_idx = torch.zeros(max(map(len, matches_of.values())), len(students), dtype=torch.int64)
    num_matched = torch.zeros_like(teacher_idx)
    places = [None] * len(pairs)
    for j, key in enumerate(students):
        for m, number in enumerate(matches_of[key]):
            image, teacher, _, count = pairs[number]
            teacher_idx[m, j], num_matched[m, j] = teachers.index((image, teacher)), count
            places[number] = (m, j)
    is_cls = [any(position[pairs[n][1]] == 0 for n in matches_of[key]) for key in students]
    matches = Matches(
        torch.tensor([row for _, row in teachers]),
        torch.tensor([position[row] for _, row in teachers]),
        torch.tensor([row for _, row in students]),
        teacher_idx,
        num_matched,
        torch.tensor([j for j, cls in enumerate(is_cls) if cls], dtype=torch.int64),
        torch.tensor([j for j, cls in enumerate(is_cls) if not cls], dtype=torch.int64),
        torch.tensor([sum(b == image for b, _ in teachers) for image in images]),
        torch.tensor([sum(b == image for b, _ in students) for image in images]),
    )
    return matches, places
