"""Folders, and zips of folders, as trees of files that are read in place."""

import os
import zipfile

# Those of torchvision's ImageFolder, and .gif and other names of the same formats.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm")
IMAGE_SUFFIXES += (".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
MOST_BYTES = 2**29  # of an image file, which may be a bomb
DEEPEST = 100  # folders in folders


class Tree:
    """Files in folders below ``path``, hidden ones left out; unused: members met that are no images by their name."""

    def __init__(self, path):
        self.path, self.unused = path, []

    def images(self, folder):
        """Members below ``folder``, at any depth, that are images, in the order of torchvision's ImageFolder."""
        members = sorted(self._below(folder, ()), key=lambda member: member.rpartition("/")[::2])
        images = [member for member in members if member.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise ValueError(f"{join(self.path, folder)}: got no images, allowed: files {', '.join(IMAGE_SUFFIXES)}")
        self.unused += sorted(set(members) - set(images))
        return images

    def _below(self, folder, above):
        """Members below ``folder``; above: identities of the folders that it lies in, to which a link may lead back."""
        here = self.identity(folder)
        if here in above:
            return
        if len(above) == DEEPEST:
            raise ValueError(
                f"{join(self.path, folder)}: got more than {DEEPEST} folders in each other, allowed: fewer"
            )
        folders, files = self.list(folder)
        yield from (join(folder, name) for name in files)
        for name in folders:
            yield from self._below(join(folder, name), (*above, here))

    def lines(self, member):
        """The lines of a text file; ValueError where it is none."""
        try:
            return self.read(member).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{join(self.path, member)}: got {error.reason}, allowed: UTF-8 text") from None


class Folder(Tree):
    """The files below a folder."""

    def identity(self, folder):
        """The same for all links to ``folder``."""
        return os.path.realpath(self.path / folder)

    def list(self, place):
        """Sorted names (folders, files) directly in ``place``."""
        with os.scandir(self.path / place) as entries:
            shown = sorted((entry.name, entry.is_dir()) for entry in entries if not _is_hidden(entry.name))
        return [name for name, is_folder in shown if is_folder], [name for name, is_folder in shown if not is_folder]

    def read(self, member):
        """The bytes of a file; ValueError for more than MOST_BYTES and what is no file, such as a pipe."""
        path = self.path / member
        if path.exists() and not path.is_file():
            raise ValueError("no file")
        _check_size(path.stat().st_size)
        return path.read_bytes()


class Zip(Tree):
    """The files of a zip, read in place; every process opens its own handle."""

    def __init__(self, path):
        super().__init__(path)
        self._file, self._owner = self._open(), os.getpid()
        self._entries = {"": (set(), set())}
        for name in self._file.namelist():
            parts = name.split("/")
            if any(map(_is_hidden, parts[:-1])) or parts[-1] and _is_hidden(parts[-1]):
                continue
            if len(parts) > DEEPEST:
                raise ValueError(f"{path}: got {name[:80]!r}..., allowed: at most {DEEPEST} folders in each other")
            for depth, part in enumerate(parts[:-1]):
                self._entries["/".join(parts[:depth])][0].add(part)
                self._entries.setdefault("/".join(parts[: depth + 1]), (set(), set()))
            if parts[-1]:
                self._entries["/".join(parts[:-1])][1].add(parts[-1])

    def _open(self):
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{self.path}: got no whole zip ({error}), allowed: a folder or .zip of images") from error

    def identity(self, folder):
        """A zip has no links that are followed."""
        return folder

    def list(self, place):
        """Sorted names (folders, files) directly in ``place``."""
        folders, files = self._entries[place]
        return sorted(folders), sorted(files)

    def read(self, member):
        """The bytes of a file; ValueError for more than MOST_BYTES."""
        if self._owner != os.getpid():  # a forked handle would share its position in the file
            self._file, self._owner = self._open(), os.getpid()
        _check_size(self._file.getinfo(member).file_size)  # zipfile reads no more than that
        return self._file.read(member)


def join(*parts):
    """The place of ``parts``, of which some may be empty."""
    return "/".join(str(part) for part in parts if str(part))


def _is_hidden(name):
    return not name or name.startswith(".") or name == "__MACOSX"


def _check_size(size):
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MOST_BYTES:,}")
