"""A headless Chromium that visits tools/page.py's page, for tests/tools/test_page.py."""

import json
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio",
         "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")


@contextmanager
def browser(width=1280, height=900):
    """A new Chromium with an empty profile, which is closed afterwards."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        # Else a browser starts with its page of a new tab, some 300 files.
        options.add_experimental_option("prefs", {"session.restore_on_startup": 4,
                                                  "session.startup_urls": ["about:blank"]})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        try:
            yield driver
        finally:
            driver.quit()


class Visitor:
    """What a visitor does on the page, and sees there."""

    def __init__(self, driver, address, patience=60):
        self.driver, self.patience = driver, patience
        driver.get(address)
        self.wait(lambda: self.find("#ask") and self.find("#video input[type=file]"), "the page")

    def find(self, css):
        """The first such element, or None."""
        found = self.driver.find_elements("css selector", css)
        return found[0] if found else None

    def wait(self, condition, what):
        """Waits until condition() is true -> its value.  A failure says what the page shows."""
        from selenium.common.exceptions import StaleElementReferenceException
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:            # replaced while it was being read
                pass
            time.sleep(0.05)
        raise AssertionError(f"{what} did not come in {self.patience} s; the page shows: "
                             f"{self.find('body').text[:2000]}")

    def click(self, css):
        self.driver.execute_script("arguments[0].click()", self.wait(lambda: self.find(css), css))

    def upload(self, path, place="#video"):
        """Uploads a file, and waits until the server has it."""
        self.wait(lambda: self.find(f"{place} input[type=file]"), "a place for a file").send_keys(
            str(path))
        shown = {"#video": "video", "#sound": "audio, #sound #waveform", "#still": "img"}[place]
        self.wait(lambda: self.find(f"{place} {shown}"), f"{Path(path).name} on the page")

    def write(self, question):
        box = self.find("#question textarea")
        box.clear()
        box.send_keys(question)

    @property
    def status(self):
        return self.find("#status").text

    @property
    def answer(self):
        return self.find("#answer textarea").get_attribute("value")

    @property
    def picture(self):
        """Source of the picture; "" before there is one."""
        image = self.find("#picture img")
        return image.get_attribute("src") if image else ""

    def ask(self, question):
        """-> the answer, after the picture has come."""
        self.write(question)
        self.click("#ask")
        return self.answered()

    def answered(self, view=""):
        """Waits for the end of an answer (with this view of the clip) -> the answer."""
        self.wait(lambda: self.status.startswith("Answered in") and view in self.status
                  and self.picture, "an answer")
        return self.answer

    def error(self):
        """Waits for a sentence that says what is wrong."""
        return self.wait(lambda: (there := self.find("#status .error")) and there.text, "an error")

    def requests(self):
        """The addresses that the browser asked for since the last call, without data: and blob:."""
        events = [json.loads(entry["message"])["message"]
                  for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events
                if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]
