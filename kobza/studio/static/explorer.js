/* What a cell, a bit or a token says when it is pointed at, touched or focused: the text of data-say goes into the .say of its
   .saying. It stays text. */
"use strict";

function say(event) {
  const from = event.target.closest?.("[data-say]");
  const out = from?.closest(".saying")?.querySelector(".say");
  if (out) out.textContent = from.dataset.say;
}

for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, say);

// a row of lessons that scrolls shows the one that is open
const current = document.querySelector(".lesson-tabs [aria-current]");
if (current) current.parentElement.scrollLeft = current.offsetLeft - current.parentElement.clientWidth / 3;
